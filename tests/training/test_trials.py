"""Side networks take turns in one model, and leave it as it was."""

import pytest
import torch

from qst_tune.models import qst_decoder
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.side.network import SideNetwork
from qst_tune.training.task import Passes
from qst_tune.training.trials import read_in_turn
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone


def model_of(seed: int, **side: object) -> QSTDecoder:
    torch.manual_seed(0)
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, **side).eval()
    torch.manual_seed(seed)
    randomize_(model.side)
    return model


@torch.no_grad()
def logits(model: QSTDecoder, batches: list[torch.Tensor]) -> Passes[list[torch.Tensor]]:
    found = []
    for batch in batches:
        yield
        found.append(model(batch))
    return found


def test_what_is_read_in_turn_is_what_each_gives_and_the_model_stays_as_it_was() -> None:
    model, batches = model_of(0), [random_tokens(2, 7), random_tokens(3, 5)]
    others = [model_of(1), model_of(2, num_side_blocks=1), model_of(3, lora_layers=1)]
    sides: list[tuple[SideNetwork, None]] = [(one.side, None) for one in others]
    before = model.side
    found = read_in_turn(model, sides, lambda: logits(model, batches))
    assert (model.side, model.shared_pass) == (before, None)
    for one, own in zip(others, found, strict=True):
        with torch.no_grad():
            assert all(torch.equal(a, one(b)) for a, b in zip(own, batches, strict=True))


def test_an_error_in_a_turn_leaves_the_model_as_it_was() -> None:
    model = model_of(0)
    before = model.side

    def failing() -> Passes[None]:
        yield
        raise ValueError("in a turn")

    with pytest.raises(ValueError, match="in a turn"):
        read_in_turn(model, [(model_of(1).side, None)], failing)
    assert (model.side, model.shared_pass) == (before, None)
