"""A tiny method and task, and lines of results as a run writes them."""

from typing import Any

import torch

from benchmarks.study.learners import Learner
from benchmarks.study.tasks import Task
from qst_tune.models import qst_decoder
from qst_tune.training.methods import parameter_groups
from tests.support.numbers import TINY, TINY_REDUCTION, tiny_backbone


def tiny_learner(*_place: Any, rows: int | None = None, **changes: Any) -> Learner:
    """QST over a tiny Llama, wherever the model is said to be."""
    model = qst_decoder(tiny_backbone(tied=True), reduction_factor=TINY_REDUCTION, **changes)
    return Learner(model, parameter_groups(model.side), rows)


def one_of_two_words() -> Task:
    """The last token says whether the first was large: one of two words."""
    rows = []
    for seed in range(48):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, TINY["vocab_size"], (5 + seed % 3,), generator=generator).tolist()
        tokens = [*words, 1 + (words[-1] > 30)]
        rows.append({"tokens": tokens, "labels": [-100] * len(words) + tokens[-1:]})
    return Task("rte", rows[:40], rows[40:], [1, 2])


def line(method: str, rate: float, seed: int, held_out: float, **changes: Any) -> dict[str, Any]:
    """A run of two steps on SST-2."""
    return {
        "task": "sst2",
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": 2,
        "held_out": held_out,
        "held_out_loss": 0.5,
        "trained": 1000,
        "tokens": 64,
        "batch_size": 16,
        "rows": None,
        "device": "cpu",
        "states": False,
        "seconds": [2.0],
        "curve": [1.0, 0.5],
        **changes,
    }


def cost(method: str, seconds: float, mib: int, **changes: Any) -> dict[str, Any]:
    """What a step on SST-2 takes."""
    return {
        "task": "sst2",
        "method": method,
        "batch_size": 16,
        "tokens": 32.0,
        "seconds": seconds,
        "peak_bytes": mib << 20,
        "device": "cpu",
        "threads": 2,
        **changes,
    }
