import pytest
import torch

from benchmarks.backbones import BACKBONES
from benchmarks.methods import METHODS, random_batch
from benchmarks.timing import Interleaved, Shape, matmul_gflops
from qst_tune.modules.loss import next_token_loss

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


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_what_makes_torchtune_faster_does_not_change_what_it_computes(name: str) -> None:
    trainee = METHODS[name].build(TINY)
    batch = random_batch(TINY, SHAPE.batch_size, SHAPE.num_tokens, seed=0)
    trainee.step(batch)
    losses, gradients = [], []
    for variant in (METHODS[name], METHODS[f"{name}_best"]):
        with variant.running(trainee):
            loss, _ = next_token_loss(trainee.model, trainee.loss, batch)
            gradients.append(torch.autograd.grad(loss, trainee.trained))
            losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for plain, best in zip(*gradients, strict=True):
        assert (plain - best).norm() <= 0.02 * plain.norm()  # bf16 has 8 bits


def test_limit_is_positive() -> None:
    assert matmul_gflops(size=64, repeats=2) > 0
