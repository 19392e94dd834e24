"""Our formats as a quantizer of transformers: each weight is quantised as it is read."""

from functools import lru_cache
from typing import Any

from torch import nn

from qst_tune.backbone.placing import Placing
from qst_tune.backbone.quantizers import names_to_quantize
from qst_tune.backbone.text_model import decoder_of, layers_of

NAME = "qst_tune"


@lru_cache(maxsize=1)
def quantization_config_type() -> Any:
    """Register our quantizer with transformers, once, and return the type of its configuration.

    ``from_pretrained`` takes one as ``quantization_config``.
    """
    # Here, since importing transformers' models takes a second, also of runs without them.
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(NAME)
    class Config(QuantizationConfigMixin):
        def __init__(self, place: Placing) -> None:
            self.quant_method: Any = NAME
            self.place = place

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": NAME, "base_quantization": str(self.place.base_quantization)}

    class Quantize(ConversionOps):
        def __init__(self, quantizer: Any) -> None:
            self.quantizer = quantizer

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **context: Any,
        ) -> dict[str, Any]:
            place = self.quantizer.quantization_config.place
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                place(context["model"], name, weight)
                context["missing_keys"].discard(name)
            return {}

    @register_quantizer(NAME)
    class Quantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = False
        quantization_config: Any
        names: frozenset[str]

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return param_name in self.names

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            layers = drop_other_modalities(model)
            place = self.quantization_config.place
            self.names = names_to_quantize(model, layers, place.base_quantization, place.stored)
            return model

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        def is_serializable(self) -> bool:
            return False

    return Config


def drop_other_modalities(model: Any) -> nn.ModuleList:
    """Remove everything except the language model, on meta and in place; return its layers."""
    decoder = decoder_of(model)
    base = getattr(model, "model", None)
    if base is not None and base is not decoder:
        for name, child in list(base.named_children()):
            if child is not decoder:
                delattr(base, name)
    return layers_of(decoder, model.config.get_text_config(decoder=True))
