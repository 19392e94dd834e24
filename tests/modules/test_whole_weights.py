"""Weights of a sharded module are whole where they are read, and only there."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qst_tune.modules.whole_weights import whole_weights
from tests.ranks import on_ranks


def read_sharded() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 5)
    expected = linear.weight.detach().clone()
    fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
    assert isinstance(linear.weight, DTensor)
    with whole_weights(linear):
        assert not isinstance(linear.weight, DTensor)
        assert torch.equal(linear.weight, expected)
    assert isinstance(linear.weight, DTensor)
    assert linear.weight.to_local().shape[0] in (2, 3)


def test_sharded_weights_are_whole_within_the_block() -> None:
    on_ranks(2, read_sharded)


def test_any_other_module_is_left_alone() -> None:
    linear = nn.Linear(3, 5)
    weight = linear.weight
    with whole_weights(linear):
        assert linear.weight is weight
    assert linear.weight is weight
