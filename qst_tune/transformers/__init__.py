"""Makes transformers know side networks: importing this package registers them.

::

    import qst_tune.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained("runs/135M_qst/side_network")
    chat = pipeline("text-generation", model="runs/135M_qst/side_network")

A side network's directory has no backbone; its ``config.json`` says where that is, unless
``from_pretrained(directory, backbone="another/directory")`` does. ``python -m
qst_tune.transformers`` is transformers' own command line (``serve``, ``chat``) with this import.
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from qst_tune.transformers.config import QSTConfig
from qst_tune.transformers.model import (
    QSTForCausalLM,
    QSTForSequenceClassification,
    get_qst_model,
)
from qst_tune.transformers.tokenizer import BackboneTokenizer

__all__ = [
    "BackboneTokenizer",
    "QSTConfig",
    "QSTForCausalLM",
    "QSTForSequenceClassification",
    "get_qst_model",
]

AutoConfig.register(QSTConfig.model_type, QSTConfig, exist_ok=True)
AutoModelForCausalLM.register(QSTConfig, QSTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(QSTConfig, QSTForSequenceClassification, exist_ok=True)
AutoTokenizer.register(QSTConfig, fast_tokenizer_class=BackboneTokenizer, exist_ok=True)
