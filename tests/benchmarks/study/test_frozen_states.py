"""States that are read from a file are those that the backbone computes."""

from pathlib import Path

import pytest
import torch

from benchmarks.study.frozen_states import FrozenStates
from qst_tune.models import qst_decoder
from qst_tune.modules.qst_decoder import QSTDecoder
from tests.helpers import TINY_REDUCTION, tiny_backbone

TOKENS = torch.arange(1, 15).view(2, 7)


def model(**choices) -> QSTDecoder:
    torch.manual_seed(0)
    made = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, **choices)
    torch.nn.init.normal_(made.side.upsample.weight, std=0.1)  # at zero nothing would be read
    return made


def logits_and_gradients(model, states=None):
    model.zero_grad()
    if states is None:
        logits = model(TOKENS)
    else:
        with states.of(TOKENS):
            logits = model(TOKENS)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.side.parameters() if p.grad is not None)]


def fails(*_args, **_kwargs):
    raise AssertionError("the backbone ran")


@pytest.mark.parametrize("choices", [{}, {"side_reads": "input"}, {"num_side_blocks": 1}])
def test_computed_and_read_states_give_the_same_bits(choices, tmp_path: Path) -> None:
    plain = logits_and_gradients(model(**choices))
    cached = model(**choices)
    states = FrozenStates(cached, tmp_path)
    computed = logits_and_gradients(cached, states)
    for layer in cached.layers:
        layer.forward = fails
    read = logits_and_gradients(cached, states)
    assert len(plain) > 3
    for expected, *others in zip(plain, computed, read, strict=True):
        assert all(torch.equal(expected, other) for other in others)


def test_a_variant_that_reads_more_layers_adds_them(tmp_path: Path) -> None:
    first, more = model(num_side_blocks=1), model()
    expected = logits_and_gradients(model())
    logits_and_gradients(first, FrozenStates(first, tmp_path))
    (path,) = tmp_path.glob("*/*.safetensors")
    size = path.stat().st_size
    logits_and_gradients(more, FrozenStates(more, tmp_path))
    assert path.stat().st_size > size
    read = logits_and_gradients(more, FrozenStates(more, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(expected, read, strict=True))


def test_other_weights_have_other_files(tmp_path: Path) -> None:
    for base_quantization in ("nf4", "int8"):
        made = model(base_quantization=base_quantization)
        logits_and_gradients(made, FrozenStates(made, tmp_path))
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
