"""The entry of the Python interface: a side network over any loaded model."""

import copy
from typing import Any

from transformers import PreTrainedModel

from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import BaseQuantization
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.side.config import SideConfig
from qst_tune.transformers.config import QSTConfig
from qst_tune.transformers.model import QSTForCausalLM, QSTForSequenceClassification
from qst_tune.transformers.over_model import side_over
from qst_tune.transformers.pretrained import QSTPreTrainedModel


def get_qst_model(
    model: PreTrainedModel,
    config: SideConfig | None = None,
    *,
    quantize: BaseQuantization = "none",
) -> Any:
    """Put a side network over a model of transformers; only that trains.

    Args:
        model (PreTrainedModel): a loaded causal language model or sequence classifier, dense or
            quantised by another program; taken over and frozen. A classifier's own head joins the
            side network and trains.
        config (SideConfig | None): of the side network; None: the defaults.
        quantize (BaseQuantization): "nf4", "fp4", "int4" or "int8" rounds the linears of a dense
            model's layers, in place, one after the other; "none" leaves the model as it is.

    Returns:
        Any: a ``QSTForCausalLM`` or ``QSTForSequenceClassification``, with the logits of the model,
        for ``Trainer``, ``SFTTrainer`` or a loop.

    Raises:
        UserError: if the model is not supported, or a setting does not fit it.
    """
    if not isinstance(model, PreTrainedModel) or isinstance(model, QSTPreTrainedModel):
        raise UserError(
            f"get_qst_model takes a model of transformers, as AutoModelForCausalLM loads it, not "
            f"{type(model).__name__}"
        )
    decoder, provenance = side_over(model, config or SideConfig(), quantize)
    known = QSTConfig(backbone=provenance.backbone_path)
    known.name_or_path = model.name_or_path
    tuned: Any
    if isinstance(decoder, QSTClassifier):
        known.id2label = model.config.id2label
        known.problem_type = model.config.problem_type
        tuned = QSTForSequenceClassification(known, decoder, provenance)
    else:
        tuned = QSTForCausalLM(known, decoder, provenance)
        tuned.generation_config = copy.deepcopy(model.generation_config)
    return tuned.eval()
