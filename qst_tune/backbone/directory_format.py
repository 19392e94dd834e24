"""How a quantised directory stores its weights, and which it does not quantise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from qst_tune.backbone.stored_weight import Decode
from qst_tune.modules.base_quantization import BaseQuantization, LinearFormat, MakeLinear
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.quantization.stored import Stored, StoredAffine, StoredNF4, StoredTransposed

# Of a list of layers; a vision-language model's had another name before transformers 4.52.
_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers")


class Layout(NamedTuple):
    """The tensors that make one weight.

    Args:
        main (str): how the name of the first one ends; what comes before it, all have in common.
        needs (str): how another one ends, without which ``main`` is an ordinary weight.
        parts (tuple[str, ...]): ends of all that may be there, further ones included.
        target (str): how the name of the dense weight ends.
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
        own (str | None): what a linear of ours that takes its codes over is named; None: no format
            of ours has such codes.
        make (MakeLinear): a linear of ours of this format, of a weight on meta.
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
        """The format where none is asked for: "auto" is the directory's own, of integers."""
        if self.own is None:
            return "nf4"
        return "fp4" if self.own == "fp4" else "nf4" if self.own == "nf4" else "auto"

    def leaves_out(self, name: str) -> bool:
        """Tell whether the config lists a linear of the layers among those not quantised.

        Args:
            name (str): from the list of layers on, such as "0.self_attn.q_proj".

        Returns:
            bool: under any of the names that such a list may use.
        """
        return any(self.skips(f"{prefix}.{name}") for prefix in _PREFIXES)

    def takes_over(self, base_quantization: LinearFormat) -> bool:
        """Tell whether codes are taken over.

        Args:
            base_quantization (LinearFormat): asked for; "auto": the directory's own.

        Returns:
            bool: False where weights are decoded, and quantised to another format.
        """
        return self.own is not None and base_quantization in ("auto", self.own)

    def linear(self, stored: Stored, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
        """Make a linear layer that takes codes over.

        Args:
            stored (Stored): of a format that has an own one.
            bias (torch.Tensor | None): ``[O]``.
            dtype (torch.dtype): that the weight decodes to.

        Returns:
            nn.Module: frozen.
        """
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
