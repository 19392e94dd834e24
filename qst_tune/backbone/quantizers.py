"""Which weights of a transformers model are stored in which format."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from qst_tune.backbone.experts import QuantizedExperts, quantize_experts
from qst_tune.errors import UserError
from qst_tune.modules.base_quantization import (
    BaseQuantization,
    QuantizedLinear,
    linear_format,
    quantization_of,
)
from qst_tune.modules.embedding_quantization import EmbeddingQuantization, check_table_format
from qst_tune.quantization.table import QuantizedTable, quantize_table

# Plain linear layers under a name of their own.
_ALIASES = ("FalconLinear",)
# Linears that choose experts: a rounded choice is another expert.
_ROUTERS = ("gate", "router", "shared_expert_gate")
# Linears of which a model reads the weight itself: Mamba's step sizes.
_READ_AS_WEIGHTS = ("dt_proj",)


def quantize_text(layers: nn.ModuleList, base_quantization: BaseQuantization) -> None:
    """Store, in place, the linears and the experts of layers; routers and norms stay as they are.

    Args:
        layers (nn.ModuleList): of a transformers model, on meta or with weights.
        base_quantization (BaseQuantization): format; "none" changes nothing.

    Raises:
        UserError: if there are experts and the format has no form for them.
    """
    make = linear_format(base_quantization)
    if make is None:
        return
    for owner, name, linear in list(_linears(layers)):
        setattr(owner, name, make(linear.weight, linear.bias))
    for owner, name, weight in list(_experts(layers)):
        if base_quantization not in ("nf4", "fp4"):
            raise UserError(
                f"base_quantization={base_quantization} has no form for the experts of a mixture "
                f"({type(owner).__name__}.{name}): use nf4, fp4 or none"
            )
        quantized = quantize_experts(weight.detach(), base_quantization)
        setattr(owner, name, nn.Parameter(quantized, requires_grad=False))


def _linears(layers: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linears to quantise. Two codes share a byte, so one with an odd number of weights stays."""
    for owner in layers.modules():
        for name, child in owner.named_children():
            if _is_plain_linear(child) and name not in (*_ROUTERS, *_READ_AS_WEIGHTS):
                linear: Any = child
                if linear.weight.numel() % 2 == 0:
                    yield owner, name, linear


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ in _ALIASES


def _experts(layers: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters ``[E, O, I]``; a convolution's has three dimensions too."""
    for owner in layers.modules():
        if isinstance(owner, _ConvNd):
            continue
        for name, weight in owner.named_parameters(recurse=False):
            if weight.ndim == 3 and min(weight.shape[1:]) > 1 and weight[0].numel() % 2 == 0:
                yield owner, name, weight


def quantization_of_text(layers: nn.ModuleList, embedding: Any) -> str:
    """Name how a backbone is stored; a tuned side network belongs to it.

    Args:
        layers (nn.ModuleList): of a transformers model.
        embedding (Any): its token embedding.

    Returns:
        str: as ``quantization_of_backbone`` names that of a torchtune decoder.
    """
    stored = quantization_of(layers)
    weight = embedding.weight
    return f"{stored}; embedding {weight.form}" if isinstance(weight, QuantizedTable) else stored


def quantize_tables(embedding: Any, model: Any, form: EmbeddingQuantization) -> None:
    """Store, in place, the embedding and the LM head as codes; a head that is tied stays so.

    Args:
        embedding (Any): the token embedding.
        model (Any): the model, for its LM head.
        form (EmbeddingQuantization): "int8", "nf4", or "none", which changes nothing.
    """
    if form == "none":
        return
    check_table_format(form, embedding)
    head = model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    _quantize_table(embedding, form)
    if is_tied:
        head.weight = embedding.weight
    else:
        _quantize_table(head, form)


def _quantize_table(owner: Any, form: Any) -> None:
    if not isinstance(owner.weight, QuantizedTable):
        table = quantize_table(owner.weight.detach(), form)
        owner.weight = nn.Parameter(table, requires_grad=False)


def is_quantized(module: Any, leaf: str) -> bool:
    """Tell whether a weight that is read must be quantised.

    Args:
        module (Any): its owner.
        leaf (str): its name there.

    Returns:
        bool: True for the weight of a quantised linear, and for experts.
    """
    if isinstance(module, QuantizedLinear):
        return leaf == "weight"
    return isinstance(getattr(module, leaf, None), QuantizedExperts)


def set_quantized(module: Any, leaf: str, weight: torch.Tensor) -> None:
    """Put a dense weight where a quantised one is expected.

    Args:
        module (Any): its owner.
        leaf (str): its name there.
        weight (torch.Tensor): on the device where it shall be.
    """
    if isinstance(module, QuantizedLinear):
        module.quantize_(weight)
    else:
        experts = quantize_experts(weight, getattr(module, leaf).quantization)
        setattr(module, leaf, nn.Parameter(experts, requires_grad=False))
    # Else the _init_weights of some models (Mamba's) would fill it with random numbers.
    getattr(module, leaf)._is_hf_initialized = True


def quantized_share(layers: nn.Module) -> float:
    """Return how much of the layers' weights is quantised.

    Args:
        layers (nn.Module): quantised by :func:`quantize_text`.

    Returns:
        float: from 0 to 1, of the number of weights.
    """
    total = quantized = 0
    for module in layers.modules():
        for name, weight in module.named_parameters(recurse=False):
            total += weight.numel()
            quantized += weight.numel() if is_quantized(module, name) else 0
    return quantized / max(1, total)
