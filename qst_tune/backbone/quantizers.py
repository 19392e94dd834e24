"""Which weights of a transformers model are stored in which format."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from qst_tune.backbone.directory_format import DirectoryFormat
from qst_tune.backbone.experts import QuantizedExperts, quantize_experts
from qst_tune.backbone.taken_experts import TakenExperts
from qst_tune.errors import UserError
from qst_tune.modules.base_quantization import (
    BaseQuantization,
    QuantizedLinear,
    linear_format,
    quantization_of,
)
from qst_tune.modules.embedding_quantization import EmbeddingQuantization, check_table_format
from qst_tune.quantization.nf4 import QuantType
from qst_tune.quantization.table import QuantizedTable, quantize_table

# Plain linear layers under a name of their own.
_ALIASES = ("FalconLinear",)
# Linears that choose experts: a rounded choice is another expert.
_ROUTERS = ("gate", "router", "shared_expert_gate")
# Linears of which a model reads the weight itself: Mamba's step sizes.
_READ_AS_WEIGHTS = ("dt_proj",)


def quantize_text(
    layers: nn.ModuleList,
    base_quantization: BaseQuantization,
    stored: DirectoryFormat | None = None,
) -> None:
    """Store, in place, the linears and the experts of layers; routers and norms stay as they are.

    Args:
        layers (nn.ModuleList): of a transformers model, on meta or with weights.
        base_quantization (BaseQuantization): format; "none" changes nothing.
        stored (DirectoryFormat | None): of a quantised directory, whose format "auto" means.

    Raises:
        UserError: if there are experts and the format has no form for them.
    """
    make = linear_format(base_quantization)
    if make is None:
        return
    if stored is not None and stored.takes_over(base_quantization):
        make = stored.make
    for owner, name, linear in list(_linears(layers, stored)):
        setattr(owner, name, make(linear.weight, linear.bias))
    for owner, name, weight in list(_experts(layers)):
        if base_quantization not in ("auto", "nf4", "fp4"):
            raise UserError(
                f"base_quantization={base_quantization} has no form for the experts of a mixture "
                f"({type(owner).__name__}.{name}): use nf4, fp4 or none"
            )
        quantized: Any = quantize_experts(weight.detach(), _quant_type(base_quantization))
        if stored is not None and stored.takes_over(base_quantization):
            quantized.quantization = stored.own  # what they will be once they are loaded
        setattr(owner, name, nn.Parameter(quantized, requires_grad=False))


def _linears(
    layers: nn.Module, stored: DirectoryFormat | None = None
) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linears to quantise. Two codes share a byte, so one with an odd number of weights stays."""
    for path, owner in layers.named_modules():
        for name, child in owner.named_children():
            if _is_plain_linear(child) and name not in (*_ROUTERS, *_READ_AS_WEIGHTS):
                linear: Any = child
                is_left_out = stored is not None and stored.leaves_out(f"{path}.{name}")
                if linear.weight.numel() % 2 == 0 and not is_left_out:
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
    if stored == "none":  # gpt-oss in MXFP4: only its experts are quantised
        of_experts = (QuantizedExperts, TakenExperts)
        experts = (p for p in layers.parameters() if isinstance(p, of_experts))
        stored = next((expert.quantization for expert in experts), "none")
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


def names_to_quantize(
    model: nn.Module,
    layers: nn.ModuleList,
    base_quantization: BaseQuantization,
    stored: DirectoryFormat | None = None,
) -> frozenset[str]:
    """Name the weights that :func:`quantize_text` would quantise.

    Args:
        model (nn.Module): on meta, not quantised.
        layers (nn.ModuleList): of its text.
        base_quantization (BaseQuantization): format.
        stored (DirectoryFormat | None): of a quantised directory.

    Returns:
        frozenset[str]: names in ``model``.
    """
    if base_quantization == "none":
        return frozenset()
    chosen = {id(linear.weight) for _, _, linear in _linears(layers, stored)}
    chosen |= {id(weight) for _, _, weight in _experts(layers)}
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, weight in named if id(weight) in chosen)


def set_quantized(
    model: nn.Module, name: str, weight: torch.Tensor, base_quantization: BaseQuantization
) -> None:
    """Quantise one weight, in place.

    Args:
        model (nn.Module): its linear layer is replaced by a quantised one.
        name (str): one of :func:`names_to_quantize`.
        weight (torch.Tensor): dense, on the device of the model.
        base_quantization (BaseQuantization): format.
    """
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    if isinstance(owner, nn.Linear):
        make = linear_format(base_quantization)
        assert make is not None
        owner = make(weight, owner.bias)
        parent, _, own_name = path.rpartition(".")
        setattr(model.get_submodule(parent), own_name, owner)
    else:
        experts = quantize_experts(weight, _quant_type(base_quantization))
        setattr(owner, leaf, nn.Parameter(experts, requires_grad=False))
    # Else the _init_weights of some models (Mamba's) would fill it with random numbers.
    for tensor in [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]:
        if not tensor.is_meta:
            tensor._is_hf_initialized = True


def _quant_type(base_quantization: BaseQuantization) -> QuantType:
    return "fp4" if base_quantization == "fp4" else "nf4"


def quantized_share(layers: nn.Module) -> float:
    """Return how much of the layers' weights is quantised.

    Args:
        layers (nn.Module): quantised by :func:`quantize_text`.

    Returns:
        float: from 0 to 1, of the number of weights.
    """
    modules = [m for m in layers.modules() if isinstance(m, QuantizedLinear)]
    quantized = sum(m.in_features * m.out_features for m in modules)
    of_experts = (QuantizedExperts, TakenExperts)
    experts = [p for p in layers.parameters() if isinstance(p, of_experts)]
    quantized += sum(p.numel() for p in experts)
    rest = {id(p): p for p in layers.parameters() if not isinstance(p, of_experts)}
    for module in modules:
        weight: Any = module
        for parameter in weight.parameters(recurse=False):
            rest.pop(id(parameter), None)
    return quantized / max(1, quantized + sum(p.numel() for p in rest.values()))
