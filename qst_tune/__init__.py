"""Quantized side tuning (QST) and other memory-saving fine-tuning methods for torchtune.

Imports nothing of torch's: torch runs ``qst_tune.plugin`` at the end of every ``import torch``, and
that imports this file. What ``_HOMES`` names is imported when it is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "QSTForCausalLM": "qst_tune.transformers",
    "QSTForSequenceClassification": "qst_tune.transformers",
    "SideConfig": "qst_tune.modules.side.config",
    "get_qst_model": "qst_tune.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
