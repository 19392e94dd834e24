"""The answer of few trials is that of trying every batch size."""

import itertools
from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf

from qst_tune.estimation.largest_batch import LargestBatch, largest_batch
from qst_tune.estimation.methods import METHODS as METHODS_BY_NAME
from qst_tune.estimation.methods import Choices
from qst_tune.estimation.step import Shape, estimate_step


def exhaustive(peak: Callable[[int], float], limit: float) -> int:
    return next(batch for batch in itertools.count() if peak(batch + 1) > limit)


def affine(batch: int) -> int:
    return 100 + 10 * batch


def bent(batch: int) -> int:
    return max(500, 300 + 5 * batch, 20 * batch - 100, 60 * batch - 3000)


def curved(batch: int) -> int:
    return 100 + batch * batch


def chunked(batch: int) -> int:
    """A chunk that grows until it is full."""
    return 100 + 50 * min(batch, 9) + 7 * batch


@pytest.mark.parametrize("peak", [affine, bent, curved, chunked])
@pytest.mark.parametrize("start", [1, 3, 4, 16, 60])
def test_answer_is_that_of_trying_every_batch_size(peak: Callable[[int], int], start: int) -> None:
    for limit in (101, 105, 111, 150, 499, 500, 501, 777, 1000, 1009, 1010, 2999, 5000):
        answer = largest_batch(peak, limit, start=start, max_trial=10_000)
        assert answer == LargestBatch(exhaustive(peak, limit), is_verified=True), (limit, start)


@pytest.mark.parametrize(("peak", "most"), [(affine, 4), (bent, 10)])
@pytest.mark.parametrize("limit", [700, 1000, 1200])
def test_few_batch_sizes_are_tried(peak: Callable[[int], int], most: int, limit: int) -> None:
    tried: list[int] = []
    largest_batch(lambda b: tried.append(b) or peak(b), limit, start=4, max_trial=128)
    assert len(tried) == len(set(tried)) <= most


def test_nothing_fits() -> None:
    answer = largest_batch(affine, 105, start=4, max_trial=64)
    assert answer == LargestBatch(0, is_verified=True)
    assert str(answer) == "none"


def test_batches_that_are_too_large_to_try_are_extrapolated() -> None:
    tried: list[int] = []
    answer = largest_batch(lambda b: tried.append(b) or affine(b), 10_000, start=4, max_trial=64)
    assert answer == LargestBatch(990, is_verified=False)
    assert str(answer) == "about 990"
    assert max(tried) == 8


CFG = {
    "model": {
        "_component_": "qst_tune.models.qst_llama3_2",
        "vocab_size": 512,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 64,
        "max_seq_len": 512,
        "intermediate_dim": 128,
        "reduction_factor": 4,
    },
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
    "loss": {"_component_": "qst_tune.modules.LinearCrossEntropyLoss"},
    "clip_grad_norm": 1.0,
    "enable_activation_checkpointing": True,
}
METHODS = ("peqa_checkpointed",)


@pytest.mark.parametrize("name", METHODS)
def test_real_estimates_give_the_answer_of_trying_every_batch_size(name: str) -> None:
    """At limits in the middle between two peaks, and just below and at one."""

    def peak(batch: int) -> int:
        choices = Choices(OmegaConf.create(CFG), torch.bfloat16)
        cost = estimate_step(METHODS_BY_NAME[name], choices, Shape(batch, 300), device="cuda")
        return cost.memory.num_bytes

    peaks = {batch: peak(batch) for batch in range(1, 9)}
    for batch in (1, 4, 7):
        middle = (peaks[batch] + peaks[batch + 1]) / 2
        for limit in (peaks[batch] - 1, peaks[batch], middle):
            answer = largest_batch(peaks.__getitem__, limit, start=2, max_trial=8)
            assert answer.batch_size == exhaustive(peaks.__getitem__, limit), (batch, limit)
