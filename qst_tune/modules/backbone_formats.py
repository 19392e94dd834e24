"""How the linears, the embedding and the LM head of a frozen backbone are stored."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.affine import AffineInit
from qst_tune.quantization.table import QuantizedTable, quantize_table

# "auto" is the format of a directory that is quantised already, and NF4 for any other.
BaseQuantization = Literal["auto", "nf4", "fp4", "int4", "int8", "none"]


class Integers(NamedTuple):
    """The format of PEQA; see :class:`~qst_tune.modules.peqa_linear.PEQALinear`."""

    bits: int = 4
    group_size: int | None = None
    init: AffineInit = "rtn"
    train_zero_points: bool = False


# How the linears of layers are stored, whichever method asks.
LinearFormat: TypeAlias = BaseQuantization | Integers


@runtime_checkable
class QuantizedLinear(Protocol):
    """A frozen linear layer that stores codes of its weight ``[out_dim, in_dim]``."""

    quantization: str
    in_features: int
    out_features: int

    def quantize_(self, weight: torch.Tensor) -> None:
        """Replace the weight by a dense one on the layer's device, quantised."""

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight."""


MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]

_FORMATS: dict[str, MakeLinear] = {
    "auto": NF4Linear,
    "nf4": NF4Linear,
    "fp4": partial(NF4Linear, quant_type="fp4"),
    # The linear of PEQA, whose scales stay frozen here.
    "int4": partial(PEQALinear, bits=4, group_size=64),
    "int8": partial(PEQALinear, bits=8),
}


def quantize_linears(module: nn.Module, base_quantization: LinearFormat = "nf4") -> None:
    """Replace, in place, every ``nn.Linear`` below ``module`` by a :class:`QuantizedLinear`.

    The module may be on the meta device. "none" changes nothing. ValueError if the format is
    unknown or cannot store a weight of this size.
    """
    make = linear_format(base_quantization)
    for name, child in module.named_children() if make else ():
        if make and type(child) is nn.Linear:
            setattr(module, name, make(child.weight, child.bias))
        else:
            quantize_linears(child, base_quantization)


def linear_format(base_quantization: LinearFormat) -> MakeLinear | None:
    """Return what makes a :class:`QuantizedLinear` from a dense weight and a bias; None for "none".

    The weight may be on meta. ValueError if the format is unknown.
    """
    if isinstance(base_quantization, Integers):
        return partial(PEQALinear, **base_quantization._asdict())
    if base_quantization not in get_args(BaseQuantization):
        known = ", ".join(get_args(BaseQuantization))
        raise ValueError(
            f"base_quantization={base_quantization!r} is unknown; choose one of {known}"
        )
    return _FORMATS.get(base_quantization)


def quantization_of(module: nn.Module) -> str:
    """Name the formats below a module: "nf4", "none" or such as "int4, groups of 64, rtn".

    A repair is named behind: "nf4 + rank 32, scales searched (text 0123abcd)".
    """
    formats = {_format_of(m) for m in module.modules() if isinstance(m, QuantizedLinear)}
    return "+".join(sorted(formats)) or "none"


def _format_of(linear: QuantizedLinear) -> str:
    repair = getattr(linear, "repair", None)
    return linear.quantization if repair is None else f"{linear.quantization} + {repair.name}"


EmbeddingQuantization = Literal["none", "int8"]


def quantize_embedding(
    decoder: TransformerDecoder, embedding_quantization: EmbeddingQuantization = "none"
) -> None:
    """Store, in place, the embedding and the LM head as codes; a tied head stays tied.

    The modules stay, and with them a scale of Gemma's embedding, positions or a soft cap: only
    their weight becomes a :class:`~qst_tune.quantization.table.QuantizedTable`. ValueError as of
    :func:`check_table_format`.
    """
    if embedding_quantization == "none":
        return
    embedding: nn.Embedding = decoder.tok_embeddings
    check_table_format(embedding_quantization, embedding)
    # A tied head has no weight of its own: it reads the embedding's at each call.
    head = decoder.output.modules() if isinstance(decoder.output, nn.Module) else ()
    rows = embedding.num_embeddings
    owners: list[Any] = [embedding]
    owners += [m for m in head if isinstance(m, nn.Linear) and m.out_features == rows]
    for owner in owners:
        owner.weight = nn.Parameter(quantize_table(owner.weight), requires_grad=False)


def check_table_format(embedding_quantization: EmbeddingQuantization, embedding: nn.Module) -> None:
    """Check the arguments: ValueError if the format is unknown or this is no ``nn.Embedding``."""
    if embedding_quantization not in get_args(EmbeddingQuantization):
        known = ", ".join(get_args(EmbeddingQuantization))
        raise ValueError(
            f"embedding_quantization={embedding_quantization!r} is unknown; choose one of {known}"
        )
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"embedding_quantization takes an nn.Embedding, not {type(embedding).__name__}"
        )


def quantization_of_backbone(decoder: TransformerDecoder) -> str:
    """Name how a backbone is stored: ``quantization_of`` and perhaps "; embedding int8"."""
    layers = quantization_of(decoder.layers)
    weight = decoder.tok_embeddings.weight
    return f"{layers}; embedding int8" if isinstance(weight, QuantizedTable) else layers
