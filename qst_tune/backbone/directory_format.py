"""How a quantised directory stores its weights, and which it does not quantise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from qst_tune.backbone.stored_weight import Decode
from qst_tune.modules.backbone_formats import BaseQuantization, LinearFormat, MakeLinear
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.quantization.stored import Stored, StoredAffine, StoredNF4, StoredTransposed

# Of a list of layers; a vision-language model's had another name before transformers 4.52.
_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers")


class Layout(NamedTuple):
    """The tensors that make one weight; all share what comes before these ends of their names.

    ``main`` is the end of the first one. Without one that ends in ``needs`` it is an ordinary
    weight. ``parts`` are all ends, optional ones included; ``target`` is that of the dense weight.
    """

    main: str
    needs: str
    parts: tuple[str, ...]
    target: str = ".weight"


@dataclass(frozen=True)
class DirectoryFormat:
    """How a directory stores its weights.

    Args:
        title (str): for messages.
        layouts (tuple[Layout, ...]): of the tensors of a weight.
        decode (Decode): puts them together.
        own (str | None): name of our linear format with the same codes; None: no format has them.
        make (MakeLinear): makes a linear of that format, of a weight on meta.
        skips (Callable[[str], bool]): whether a module of this name is not quantised.
    """

    title: str
    layouts: tuple[Layout, ...]
    decode: Decode
    own: str | None
    make: MakeLinear
    skips: Callable[[str], bool]

    @property
    def default(self) -> BaseQuantization:
        """The format unless another is asked for: "auto" is the directory's own, of integers."""
        if self.own is None:
            return "nf4"
        return "fp4" if self.own == "fp4" else "nf4" if self.own == "nf4" else "auto"

    def leaves_out(self, name: str) -> bool:
        """Return whether the config lists a linear among those not quantised, by any of its names.

        ``name`` starts after the list of layers, such as "0.self_attn.q_proj".
        """
        return any(self.skips(f"{prefix}.{name}") for prefix in _PREFIXES)

    def takes_over(self, base_quantization: LinearFormat) -> bool:
        """Return whether codes are taken over; else weights are decoded and quantised again."""
        return self.own is not None and base_quantization in ("auto", self.own)

    def linear(self, stored: Stored, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
        """Make a frozen linear of codes, which decodes to ``dtype``, and of a bias ``[O]``."""
        if isinstance(stored, StoredTransposed):
            stored = stored.weight  # of experts, which are linear layers here
        if isinstance(stored, StoredNF4):
            taken = NF4Linear(stored.nf4(dtype), bias, quant_type=stored.quant_type)
            taken.quantization = self.own or taken.quantization
            return taken
        assert isinstance(stored, StoredAffine)
        linear: Any = self.make(torch.empty(stored.shape, device="meta"), bias)
        linear.take_(stored)
        frozen: nn.Module = linear.requires_grad_(False)
        return frozen
