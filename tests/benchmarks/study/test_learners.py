"""What trains in each method of the study, over the real model where it is there."""

from pathlib import Path

import pytest
import torch

from benchmarks.methods import default_config
from benchmarks.study.learners import fast_decoding
from benchmarks.study.methods import METHODS

CHECKPOINT = Path(default_config().checkpointer.checkpoint_dir)


@pytest.mark.slow
@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="`make quickstart` fetches SmolLM2")
@pytest.mark.parametrize(
    "name",
    [
        "full",
        "lora",
        "qlora",
        "qlora_checkpointed",
        "lora_last_6",
        "qst",
        "qst_nf4",
        "qst_nf4_rank_32",
        "dial_10_nf4_rank_32",
        "dial_3_saved",
        "last_30_nf4_by_2_rows",
        "bf16",
        "lst",
        "peqa",
    ],
)
def test_what_trains_gets_a_gradient_and_nothing_else_does(name: str) -> None:
    torch.manual_seed(0)
    learner = METHODS[name].build(CHECKPOINT, torch.device("cpu"))
    with fast_decoding():
        learner.hidden(torch.arange(1, 9)[None]).square().mean().backward()
    trained = {id(p) for group in learner.groups for p in group["params"]}
    with_gradient = {id(p) for p in learner.model.parameters() if p.grad is not None}
    assert with_gradient <= trained
    assert with_gradient, "nothing learns"
    assert learner.num_trained == sum(
        p.numel() for p in learner.model.parameters() if id(p) in trained
    )
