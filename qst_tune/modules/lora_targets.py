"""Which linears of a layer get LoRA, by the names that torchtune's LoRA builders have."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import nn

from qst_tune.modules.backbone_formats import QuantizedLinear

AttentionLinear = Literal["q_proj", "k_proj", "v_proj", "output_proj"]
ALL_ATTENTION: tuple[AttentionLinear, ...] = get_args(AttentionLinear)

# Widths of the input and of the output of each linear of a layer, by its path in the layer.
LinearSizes = Mapping[str, tuple[int, int]]

# The last projection of an attention has many names; the others are inputs.
_OUTPUT_NAMES = ("output_proj", "o_proj", "out_proj", "dense", "c_proj", "wo")


def linears_below(layer: nn.Module) -> LinearSizes:
    """List the linears of a layer, dense or stored in codes, or transposed as GPT-2's."""
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            sizes[path] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":
            in_dim, out_dim = module.get_parameter("weight").shape
            sizes[path] = (in_dim, out_dim)
    return sizes


def chosen_linears(
    sizes: LinearSizes, attention: Sequence[AttentionLinear], *, mlp: bool
) -> LinearSizes:
    """Choose those of ``lora_attn_modules`` and, with ``apply_lora_to_mlp``, of all other parts.

    A linear inside an attention that makes several of queries, keys and values, or a part of them
    (fused or low-rank projections), is chosen with any of them.
    """
    return {path: size for path, size in sizes.items() if _is_chosen(path, attention, mlp)}


def _is_chosen(path: str, attention: Sequence[AttentionLinear], mlp: bool) -> bool:
    *owners, name = path.split(".")
    if not any("attn" in owner or "attention" in owner for owner in owners):
        return mlp
    if name in _OUTPUT_NAMES:
        return "output_proj" in attention
    if name in ALL_ATTENTION:
        return name in attention
    return any(kind != "output_proj" for kind in attention)
