"""Experts in another program's codes compute what dense ones do, one decoded at a time."""

import torch

from qst_tune.backbone.directory_methods import read_directory_format
from qst_tune.backbone.taken_experts import TakenExperts
from qst_tune.quantization.gptq import from_gptq
from qst_tune.quantization.parts import parts_of
from tests.reference import stored_formats as formats
from tests.stored_models import FORMATS


def experts(count: int = 3) -> tuple[TakenExperts, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = read_directory_format("config.json", FORMATS["gptq"][0])
    drawn = [[formats.gptq(rows, 64, generator) for _ in range(count)] for rows in (16, 24)]
    pieces = [
        [stored.linear(from_gptq(p, bits=4, form="gptq"), None, torch.float32) for p, _ in piece]
        for piece in drawn
    ]
    dense = torch.cat([torch.stack([d for _, d in piece]) for piece in drawn], dim=1)
    return TakenExperts(
        pieces, tuple(dense.shape), torch.float32, torch.device("cpu"), "gptq"
    ), dense


def test_an_index_decodes_one_expert_and_anything_else_all() -> None:
    ours, dense = experts()
    assert type(ours[1]) is torch.Tensor
    assert torch.equal(ours[1], dense[1])
    x = torch.randn(3, 5, 64)
    assert torch.equal(torch.bmm(x, ours.transpose(1, 2)), torch.bmm(x, dense.transpose(1, 2)))


def test_as_a_parameter_they_keep_their_codes() -> None:
    ours, dense = experts()
    parameter = torch.nn.Parameter(ours, requires_grad=False)
    assert isinstance(parameter, TakenExperts)
    assert torch.equal(parameter.dense(), dense)


def test_their_bytes_are_counted() -> None:
    """40 x 64 codes of 4 bits and, for 32 of them, a scale in fp32 and a zero point in a byte."""
    ours, _ = experts()
    parts = parts_of(ours)
    assert sum(p.numel() * p.itemsize for p in parts.values()) == 3 * 40 * (64 // 2 + 2 * 5)
