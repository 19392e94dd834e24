"""Which weights of a transformers model are stored in which format."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from qst_tune.backbone.experts import ExpertLinears, QuantizedExperts, quantize_experts
from qst_tune.backbone.stored_weights import DirectoryFormat
from qst_tune.modules.backbone_formats import (
    EmbeddingQuantization,
    LinearFormat,
    MakeLinear,
    QuantizedLinear,
    check_table_format,
    linear_format,
    quantization_of,
)
from qst_tune.modules.lora_targets import LinearSizes, linears_below
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.table import QuantizedTable, quantize_table

# Plain linear layers under a name of their own.
_ALIASES = ("FalconLinear",)
# Linears that choose experts: a rounded choice is another expert.
_ROUTERS = ("gate", "router", "shared_expert_gate")
# Linears of which a model reads the weight itself: Mamba's step sizes.
_READ_AS_WEIGHTS = ("dt_proj",)


def quantize_text(
    layers: nn.ModuleList,
    base_quantization: LinearFormat,
    stored: DirectoryFormat | None = None,
) -> None:
    """Store, in place, the linears and the experts of layers; routers and norms stay as they are.

    The layers may be on meta. "none" changes nothing; "auto" is the format of ``stored``, a
    quantised directory.
    """
    make = linear_format(base_quantization)
    if make is None:
        return
    take_over = stored.make if stored and stored.takes_over(base_quantization) else None
    for owner, name, linear in list(_linears(layers, stored)):
        setattr(owner, name, (take_over or make)(linear.weight, linear.bias))
    for owner, name, weight in list(_experts(layers)):
        put_experts(owner, name, weight.detach(), base_quantization, take_over)


def _linears(
    layers: nn.Module, stored: DirectoryFormat | None = None
) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linears to quantise. Two codes share a byte, so one with an odd number of weights stays."""
    for path, owner in layers.named_modules():
        for name, child in owner.named_children():
            names = {*path.split("."), name}
            if _is_plain_linear(child) and not names & {*_ROUTERS, *_READ_AS_WEIGHTS}:
                linear: Any = child
                is_left_out = stored is not None and stored.leaves_out(f"{path}.{name}")
                if linear.weight.numel() % 2 == 0 and not is_left_out:
                    yield owner, name, linear


def linear_sizes(layer: nn.Module) -> LinearSizes:
    """List the linears of a layer by path, dense or stored in codes, without routers."""
    untouched = {*_ROUTERS, *_READ_AS_WEIGHTS}
    return {
        path: size
        for path, size in linears_below(layer).items()
        if not untouched & set(path.split("."))
    }


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
    """Name how a backbone is stored, as ``quantization_of_backbone`` does for torchtune's."""
    stored = quantization_of(layers)
    if stored == "none":  # gpt-oss of MXFP4, rounded to NF4: only its experts are quantised
        experts = (p for p in layers.parameters() if isinstance(p, QuantizedExperts))
        stored = next((expert.quantization for expert in experts), "none")
    weight = embedding.weight
    return f"{stored}; embedding int8" if isinstance(weight, QuantizedTable) else stored


def quantize_tables(embedding: Any, model: Any, form: EmbeddingQuantization) -> None:
    """Store, in place, the embedding and the LM head as codes; a tied head stays tied."""
    if form == "none":
        return
    check_table_format(form, embedding)
    head = model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    for owner in [embedding] if is_tied else [embedding, head]:
        if not isinstance(owner.weight, QuantizedTable):
            table = quantize_table(owner.weight.detach())
            owner.weight = nn.Parameter(table, requires_grad=False)
    if is_tied:
        head.weight = embedding.weight


def names_to_quantize(
    model: nn.Module,
    layers: nn.ModuleList,
    base_quantization: LinearFormat,
    stored: DirectoryFormat | None = None,
) -> frozenset[str]:
    """Name the weights of a model on meta that :func:`quantize_text` would quantise."""
    if base_quantization == "none":
        return frozenset()
    chosen = {id(linear.weight) for _, _, linear in _linears(layers, stored)}
    chosen |= {id(weight) for _, _, weight in _experts(layers)}
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, weight in named if id(weight) in chosen)


def set_quantized(
    model: nn.Module, name: str, weight: torch.Tensor, base_quantization: LinearFormat
) -> None:
    """Quantise one dense weight of :func:`names_to_quantize` on its device, in place."""
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    if isinstance(owner, nn.Linear):
        make = linear_format(base_quantization)
        assert make is not None
        owner = make(weight, owner.bias)
        parent, _, own_name = path.rpartition(".")
        setattr(model.get_submodule(parent), own_name, owner)
    else:
        put_experts(owner, leaf, weight, base_quantization)
    keep(owner)


def put_experts(
    owner: Any,
    name: str,
    weight: torch.Tensor,
    base_quantization: LinearFormat,
    take_over: MakeLinear | None = None,
) -> None:
    """Quantise the experts of a layer, in place: in one tensor of NF4 or FP4, else a linear each.

    ``weight`` is ``[E, O, I]``, or ``[E, I, O]`` where the model multiplies ``x W``; "auto" is NF4.
    ``take_over`` makes linears of a directory's own format instead.
    """
    if take_over is None and base_quantization in ("auto", "nf4", "fp4"):
        quantized = quantize_experts(weight, "fp4" if base_quantization == "fp4" else "nf4")
        setattr(owner, name, nn.Parameter(quantized, requires_grad=False))
        return
    make = take_over or linear_format(base_quantization)
    assert make is not None
    experts = [make(expert.T if is_transposed(owner) else expert, None) for expert in weight]
    replace_experts(owner, name, experts, weight.dtype)


def replace_experts(owner: Any, name: str, experts: list[nn.Module], dtype: torch.dtype) -> None:
    """Replace a parameter of ``owner`` by one linear for each expert, which decode to ``dtype``."""
    delattr(owner, name)
    setattr(owner, name, ExpertLinears(experts, dtype, is_transposed=is_transposed(owner)))
    for linear in getattr(owner, name).modules():
        keep(linear)


def keep(module: nn.Module) -> None:
    """Mark weights as loaded: else the ``_init_weights`` of some models would draw new ones."""
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark
    if isinstance(module, PEQALinear):  # they ask for its weight (Mamba, GPT-BigCode)
        vars(module)["weight"] = module.codes


def forget_weights(model: nn.Module) -> None:
    """Take away what :func:`keep` has put where a dense weight would be, once all is loaded."""
    for module in model.modules():
        if isinstance(module, PEQALinear):
            vars(module).pop("weight", None)


def is_transposed(owner: Any) -> bool:
    """Whether a layer's experts are ``[E, I, O]`` (gpt-oss, Llama 4)."""
    return bool(getattr(owner, "is_transposed", type(owner).__name__ == "Llama4TextExperts"))


def quantized_share(layers: nn.Module) -> float:
    """Return the share of the layers' weights that is quantised, from 0 to 1."""
    modules = [m for m in layers.modules() if isinstance(m, QuantizedLinear)]
    quantized = sum(m.in_features * m.out_features for m in modules)
    experts = [p for p in layers.parameters() if isinstance(p, QuantizedExperts)]
    quantized += sum(p.numel() for p in experts)
    own = {id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters(recurse=False)}
    own |= {id(p) for p in experts}
    rest = sum(p.numel() for p in layers.parameters() if id(p) not in own)
    return quantized / max(1, quantized + rest)
