"""Quantized side tuning (QST) and other memory-saving fine-tuning methods for torchtune.

Imports nothing: torch runs ``qst_tune.plugin`` at the end of every ``import torch``, and that
imports this file.
"""

__version__ = "0.1.0"
