"""The weights of a tuned PEQA model under the names that its hub directory has.

A conversion from the model's names to the hub's may rename, split, join and reorder the rows of
weights: of integers it is applied to the numbers of their rows.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torchtune.models.convert_weights import tune_to_hf

from qst_tune.backbone.experts import ExpertLinears, QuantizedExperts
from qst_tune.backbone.transformers_models import PEQATransformer
from qst_tune.errors import UserError
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.peqa_model import PEQAModel, without_wrappers
from qst_tune.quantization.affine import AffineWeight
from qst_tune.quantization.stored import in_own_order
from qst_tune.quantization.table import QuantizedTable

Tensors = dict[str, torch.Tensor]


class IntegerRows(NamedTuple):
    """Integer rows of a hub weight, of linears of one layout; ``linear`` is that of the first."""

    weight: AffineWeight
    linear: PEQALinear


def dense_tensors(model: PEQAModel, dtype: torch.dtype) -> Tensors:
    """Decode the whole model to the CPU, by the hub's names."""
    weights = {name: _decoded(module, dtype) for name, module in _quantised(_root(model))}
    return _to_hub(model, {**other_tensors(model, dtype), **weights})


def other_tensors(model: PEQAModel, dtype: torch.dtype) -> Tensors:
    """Collect what is not integers on the CPU, by the model's names, without a tied head."""
    root = _root(model)
    inside = tuple(f"{name.removesuffix('.weight')}." for name, _ in _quantised(root))
    found: dict[int, tuple[str, Any]] = {}
    for name, tensor in root.state_dict(keep_vars=True).items():
        if not name.startswith(inside) or name.endswith(".bias"):
            found.setdefault(id(tensor), (name, tensor))
    return {name: _plain(tensor, dtype) for name, tensor in found.values()}


def integer_tensors(model: PEQAModel, dtype: torch.dtype) -> tuple[Tensors, dict[str, IntegerRows]]:
    """Split the model into dense tensors, on the CPU, and integer weights, both by the hub's names.

    UserError if the hub's form of a weight is not that of linear layers.
    """
    linears: list[PEQALinear] = []
    numbers: Tensors = {}
    for name, module in _quantised(_root(model)):
        parts = list(_linears(module))
        first = sum(linear.out_features for linear in linears)
        count = sum(linear.out_features for linear in parts)
        rows = torch.arange(first, first + count, dtype=torch.int64)
        linears += parts
        if isinstance(module, ExpertLinears):
            rows = rows.view(len(module), -1, 1)
            numbers[name] = rows.mT if module.is_transposed else rows
        else:
            numbers[name] = rows[:, None]
    converted = _to_hub(model, {**other_tensors(model, dtype), **numbers})
    dense, integers = {}, {}
    for name, tensor in converted.items():
        if tensor.dtype != torch.int64:
            dense[name] = tensor
        elif tensor.ndim != 2 or tensor.shape[1] != 1 or not name.endswith(".weight"):
            raise UserError(
                f"{name} is no weight of a linear layer, which GPTQ's format is for: use "
                "format=dense"
            )
        else:
            integers[name] = _gather(linears, tensor[:, 0])
    return dense, integers


def _gather(linears: list[PEQALinear], rows: torch.Tensor) -> IntegerRows:
    """Rows by their numbers over all linears."""
    ends = torch.tensor([linear.out_features for linear in linears]).cumsum(0)
    which, counts = torch.bucketize(rows, ends, right=True).unique_consecutive(return_counts=True)
    pieces = []
    for index, own in zip(which.tolist(), rows.split(counts.tolist()), strict=True):
        linear = linears[index]
        local = (own - (ends[index] - linear.out_features)).to(linear.codes.device)
        pieces.append(AffineWeight(*(part[local] for part in linear.affine_weight())))
    first = linears[int(which[0])]
    others = [linears[index] for index in which.tolist()]
    if any(
        linear.layout != first.layout or linear.input_order is not None for linear in others[1:]
    ):
        raise UserError(
            "linears of other groups are one weight in the hub's form: use format=dense"
        )
    return IntegerRows(AffineWeight(*map(torch.cat, zip(*pieces, strict=True))), first)


def decoded_rows(rows: IntegerRows) -> torch.Tensor:
    """Decode rows of a weight, fp32, with the input channels in their own order."""
    codes, scale, zero_point = rows.weight

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(rows.linear.layout.group_size, 1)[:, : codes.shape[1]]

    weight = spread(scale) * (codes.float() - spread(zero_point).float())
    order = rows.linear.input_order
    return weight if order is None else in_own_order(weight, order)


def _root(model: PEQAModel) -> nn.Module:
    return model.backbone.model if isinstance(model, PEQATransformer) else model


def _quantised(root: nn.Module) -> Iterator[tuple[str, ExpertLinears | PEQALinear]]:
    """Integer linears and experts, by the names of the weights whose place they take."""
    experts: list[str] = []
    for name, module in root.named_modules():
        plain = without_wrappers(name)
        if isinstance(module, ExpertLinears):
            experts.append(f"{plain}.")
            yield plain, module
        elif isinstance(module, PEQALinear) and not plain.startswith(tuple(experts)):
            yield f"{plain}.weight", module


def _linears(module: nn.Module) -> Iterator[PEQALinear]:
    """In the order of the rows."""
    yield from (m for m in module.modules() if isinstance(m, PEQALinear))


def _decoded(module: ExpertLinears | PEQALinear, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(module, ExpertLinears):
        return module.dense().to(dtype=dtype, device="cpu")
    weight: torch.Tensor = module.dense_weight(dtype)
    return weight.cpu()


def _plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dense: torch.Tensor = tensor.detach()
    if isinstance(tensor, QuantizedTable):
        dense = tensor.dense(dtype)
    elif isinstance(tensor, QuantizedExperts):
        dense = tensor.dense()
    return dense.to(dtype=dtype, device="cpu")


def _to_hub(model: PEQAModel, tensors: Tensors) -> Tensors:
    if not isinstance(model, PEQATransformer):
        return _from_torchtune(model, tensors)
    from transformers.core_model_loading import revert_weight_conversion

    reverted: Tensors = revert_weight_conversion(model.backbone.model, tensors)
    return reverted


def _from_torchtune(model: PEQAModel, tensors: Tensors) -> Tensors:
    attention: Any = model.layers[0].attn
    heads = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads}
    converted: Tensors = {}
    for name, tensor in tensors.items():
        sizes = {"dim": tensor.shape[-1], "head_dim": attention.head_dim}
        converted |= tune_to_hf({name: tensor}, **heads, **sizes)
    return converted
