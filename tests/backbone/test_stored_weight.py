"""A stored weight keeps its codes while it is moved, stacked or joined, and decodes otherwise."""

import pytest
import torch
from torch import nn

from qst_tune.backbone.stored_weight import LazyWeight, StoredWeight
from qst_tune.errors import UserError
from qst_tune.quantization.gptq import from_gptq
from tests.reference import stored_formats as formats


def weights(count: int, out_dim: int = 16) -> tuple[list[StoredWeight], torch.Tensor]:
    generator = torch.Generator().manual_seed(out_dim)
    pairs = [formats.gptq(out_dim, 64, generator) for _ in range(count)]
    stored = [from_gptq(parts, bits=4, form="gptq") for parts, _ in pairs]
    tensors = [StoredWeight([[s]], s.shape, torch.float32) for s in stored]
    return tensors, torch.stack([dense for _, dense in pairs])


def test_codes_stay_through_renaming_a_dtype_and_a_parameter() -> None:
    (weight,), dense = weights(1)
    for same in (weight.detach(), weight.to(torch.float32), nn.Parameter(weight).data):
        assert isinstance(same, StoredWeight)
        assert same.pieces[0][0] is weight.pieces[0][0]
    half = weight.to(torch.bfloat16)
    assert isinstance(half, StoredWeight)
    assert torch.equal(half.dense(), dense[0].bfloat16())


def test_experts_keep_their_codes_through_stacking_and_joining() -> None:
    gates, dense_gates = weights(3, out_dim=16)
    ups, dense_ups = weights(3, out_dim=24)
    joined = torch.cat([torch.stack(gates, dim=0), torch.stack(ups)], dim=1)
    assert isinstance(joined, StoredWeight)
    assert joined.is_stack
    assert joined.shape == (3, 40, 64)
    assert torch.equal(joined.dense(), torch.cat([dense_gates, dense_ups], dim=1))


def test_every_other_operation_sees_the_dense_weight() -> None:
    (one, other), dense = weights(2)
    for ours, plain in [
        (one[2:5], dense[0][2:5]),
        (one.T.contiguous(), dense[0].T),
        (torch.cat([one, other]), torch.cat(list(dense))),
        (torch.stack([one, other], dim=1), dense.transpose(0, 1)),
        (one + 1, dense[0] + 1),
        (torch.stack([one, dense[1]]), dense),
    ]:
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, plain)


def test_a_weight_is_put_together_only_when_it_is_asked_for() -> None:
    asked: list[str] = []

    def decode(parts: dict[str, torch.Tensor]) -> None:
        asked.extend(parts)
        raise KeyError("scales")

    lazy = LazyWeight("model.q.weight", {"qweight": torch.zeros(1)}, decode, torch.float32)
    assert not asked
    with pytest.raises(
        UserError, match=r"model.q.weight is damaged: its tensor 'scales' is missing"
    ):
        lazy[...]
    assert asked == ["qweight"]
