import pytest

from benchmarks.backbones import BACKBONES
from benchmarks.methods import METHODS
from benchmarks.timing import Interleaved, Shape, matmul_gflops

TINY = BACKBONES["tiny"]
SHAPE = Shape(2, 16)


def test_shape_reads_and_writes_itself() -> None:
    assert Shape.parse("4x512") == Shape(4, 512)
    assert str(Shape(4, 512)) == "4x512"
    for wrong in ("4", "x512", "4x", "0x512", "4x-1"):
        with pytest.raises(ValueError, match="must look like 4x512"):
            Shape.parse(wrong)


def test_every_method_takes_steps_on_the_same_batches() -> None:
    runner = Interleaved(list(METHODS), TINY, report=lambda _: None)
    runner.warm_up(list(METHODS), SHAPE)
    steps = list(runner.rounds(list(METHODS), SHAPE, range(2)))
    for step in steps:
        assert step.seconds.keys() == step.losses.keys() == METHODS.keys()
        assert all(seconds > 0 for seconds in step.seconds.values())
        assert step.limit_gflops > 0
        # Of a model with random weights: log(512) = 6.2, give or take what a few steps learn.
        assert all(5.5 < loss < 7.5 for loss in step.losses.values())


def test_methods_of_one_model_share_it_and_leave_it_as_it_was() -> None:
    method = METHODS["qst_recomputed"]
    assert method.model == METHODS["qst_stored"].model
    trainee = METHODS["qst_stored"].build(TINY)
    before = trainee.model.side.recompute
    with method.running(trainee):
        assert trainee.model.side.recompute
    assert trainee.model.side.recompute == before


def test_first_loss_is_that_of_the_same_weights() -> None:
    """Full and LoRA start at the bf16 backbone, QLoRA and QST at the same one in NF4."""
    names = ["full", "lora", "qlora", "qlora_checkpointed", "qst_stored"]
    runner = Interleaved(names, TINY, report=lambda _: None)
    (step,) = runner.rounds(names, SHAPE, range(1))
    assert step.losses["lora"] == pytest.approx(step.losses["full"], abs=2e-3)
    assert step.losses["qlora_checkpointed"] == step.losses["qlora"]
    assert step.losses["qst_stored"] == pytest.approx(step.losses["qlora"], abs=2e-3)


def test_limit_is_positive() -> None:
    assert matmul_gflops(size=64, repeats=2) > 0
