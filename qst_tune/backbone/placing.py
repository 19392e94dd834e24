"""Put each weight into a model as transformers' loader reads it, and count what became of it."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torchtune import utils

from qst_tune.backbone.experts import JoinedLinear
from qst_tune.backbone.quantizers import keep, names_to_quantize, replace_experts, set_quantized
from qst_tune.backbone.stored_weights import DirectoryFormat, StoredWeight
from qst_tune.backbone.text_model import decoder_of, layers_of
from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import LinearFormat
from qst_tune.quantization.stored import stored_on

log = utils.get_logger("INFO")

# Takes the tensors of a module, by its name, away, and leaves empty ones.
Take = Callable[[str, nn.Module], None]


class Placing:
    """Puts each weight into a model as it is read, and counts what became of it.

    ``taken_over`` weights have the codes of a quantised directory; ``rounded`` ones were quantised
    here.

    Args:
        base_quantization (LinearFormat): of linears and experts of the layers.
        device (torch.device): where they must be.
        stored (DirectoryFormat | None): how the directory stores its weights; None: dense.
        take (Take | None): gets each module, by name, as soon as it has a weight.
    """

    def __init__(
        self,
        base_quantization: LinearFormat,
        device: torch.device,
        stored: DirectoryFormat | None = None,
        take: Take | None = None,
    ) -> None:
        self.take = take
        self.base_quantization, self.device, self.stored = base_quantization, device, stored
        self.taken_over = self.rounded = 0
        # Sums of squares: of the differences that rounding made, of the numbers that were rounded.
        self._lost, self._total = 0.0, 0.0
        self.error: UserError | None = None

    def __call__(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Put one weight, perhaps a ``StoredWeight``, into a model, in place.

        UserError if it has another shape than in the model. transformers turns that into a report
        of its own; ``error`` is what a user must see.
        """
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        if weight.shape != getattr(owner, leaf).shape:
            self.error = self.error or UserError(
                f"{name} has shape {tuple(weight.shape)} in the directory and "
                f"{tuple(getattr(owner, leaf).shape)} by its config.json"
            )
            raise self.error
        is_stored = isinstance(weight, StoredWeight)
        if self.stored is None:
            set_quantized(model, name, weight.to(self.device), self.base_quantization)
        elif not self.stored.takes_over(self.base_quantization) or not (
            is_stored or isinstance(owner, nn.Linear)
        ):
            self._round(model, name, weight)
        elif isinstance(weight, StoredWeight):
            self._take_over(model, name, weight, self.stored)
        else:  # the directory has it dense
            owner.weight = nn.Parameter(weight.to(self.device), requires_grad=False)
            keep(owner)
        if self.take is not None:
            self.take(path, model.get_submodule(path))

    def _take_over(
        self, model: nn.Module, name: str, weight: StoredWeight, stored: DirectoryFormat
    ) -> None:
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        bias = None if weight.is_stack else owner.bias
        pieces = [
            [stored.linear(stored_on(w, self.device), bias, weight.dtype) for w in weights]
            for weights in weight.pieces
        ]
        if weight.is_stack:
            experts = [
                parts[0] if len(parts) == 1 else JoinedLinear(parts)
                for parts in zip(*pieces, strict=True)
            ]
            replace_experts(owner, leaf, experts, weight.dtype)
            self.taken_over += len(weight.pieces) * len(weight)
        else:
            ((owner,),) = pieces
            model.set_submodule(path, owner)
            self.taken_over += 1
        keep(owner)

    def _round(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        dense = (
            weight.dense(self.device)
            if isinstance(weight, StoredWeight)
            else weight.to(self.device)
        )
        set_quantized(model, name, dense, self.base_quantization)
        self.rounded += 1
        path, _, leaf = name.rpartition(".")
        for before, after in _pairs(dense, model.get_submodule(path), leaf):
            self._total += float(before.float().square().sum())
            self._lost += float((after.float() - before.float()).square_().sum())

    def report(self) -> None:
        """Log what became of the weights of a quantised directory."""
        assert self.stored is not None
        parts = []
        if self.taken_over:
            parts.append(f"{self.taken_over} weights taken over as they are")
        if self.rounded:
            target = "nf4" if self.base_quantization == "auto" else self.base_quantization
            relative = (self._lost / self._total) ** 0.5 if self._total else 0.0
            parts.append(
                f"{self.rounded} weights decoded and rounded to {target}, which adds an error of "
                f"{100 * relative:.2f} % (root mean square)"
            )
        log.info(f"{self.stored.title}: {'; '.join(parts) or 'all weights decoded'}")


def _pairs(
    dense: torch.Tensor, owner: Any, leaf: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A weight before and after rounding, an expert at a time."""
    if hasattr(owner, "dense_weight"):
        yield dense, owner.dense_weight(torch.float32)
        return
    for index, expert in enumerate(dense):
        after = getattr(owner, leaf)[index]
        yield expert, after if isinstance(after, torch.Tensor) else after.dense()


def decode_rest_(model: nn.Module, device: torch.device) -> None:
    """Decode, in place, stored weights where the model has dense ones, as an LM head in codes."""
    decoded: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if isinstance(weight, StoredWeight):
                if id(weight) not in decoded:
                    dense = weight.dense(device)
                    decoded[id(weight)] = nn.Parameter(dense, requires_grad=False)
                module._parameters[name] = decoded[id(weight)]


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
        def __init__(self, place: Placing) -> None:
            self.place = place

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **context: Any,
        ) -> dict[str, Any]:
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                self.place(context["model"], name, weight)
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
            return Quantize(self.quantization_config.place)

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
