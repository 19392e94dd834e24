"""Captured passes change no number, and take no pass that they could not repeat."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.models import qst_decoder
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.captured_passes import PLAIN_PASSES, CapturedPasses
from qst_tune.modules.loss import connect_loss, next_token_loss
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.methods import load_qst, parameter_groups
from tests.support.checkpoints import finetune_config
from tests.support.model_types import tiny_model as tiny_model_of
from tests.support.numbers import random_tokens, randomize_, tiny_backbone
from tests.support.recipe_runs import finetune
from tests.support.stand_in_graphs import StandInGraphs, stand_in_passes

SHAPES = [(2, 11), (2, 16), (2, 11), (2, 11), (2, 16), (2, 11), (2, 16), (1, 16), (2, 11)]
MODULE = "qst_tune.modules.captured_passes"
Step = tuple[torch.Tensor, list[torch.Tensor | None]]


def tiny_model(device: str = "cpu", **side: Any) -> QSTModel:
    """A model with a gradient for each parameter."""
    torch.manual_seed(0)
    is_gpu = device == "cuda"
    sizes = {"embed_dim": 256, "intermediate_dim": 512, "num_heads": 4, "num_kv_heads": 2}
    backbone = tiny_backbone(
        dtype=torch.bfloat16 if is_gpu else torch.float32, **(sizes if is_gpu else {})
    )
    model = qst_decoder(
        backbone, base_quantization="nf4" if is_gpu else "none", reduction_factor=4, **side
    ).to(device)
    randomize_(model.side)
    model.side.recompute = True
    return model.train()


def batch(shape: tuple[int, int], number: int, **inputs: Any) -> dict[str, Any]:
    torch.manual_seed(number)
    tokens = random_tokens(*shape)
    return {"tokens": tokens, "labels": tokens.roll(-1), **inputs}


def steps(
    model: QSTModel,
    batches: list[dict[str, Any]],
    accumulation: int = 1,
    autocast: Callable[[int], bool] = lambda number: False,
) -> list[Step]:
    """Train on each batch, and validate after each step."""
    loss_of = LinearCrossEntropyLoss()
    connect_loss(loss_of, model)
    optimizer = torch.optim.AdamW(parameter_groups(model.side), lr=1e-2)
    device = next(model.parameters()).device
    found: list[Step] = []
    for number, given in enumerate(batches):
        given = {name: value.to(device) for name, value in given.items()}
        torch.manual_seed(100 + number)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast(number)):
            loss, _ = next_token_loss(model, loss_of, given)
        loss.backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in model.side.parameters()]
        found.append((loss.detach(), gradients))
        if (number + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            next_token_loss(model.eval(), loss_of, given)
        model.train()
    return found


def assert_equal(found: list[Step], expected: list[Step]) -> None:
    for (loss, gradients), (plain_loss, plain_gradients) in zip(found, expected, strict=True):
        assert torch.equal(loss, plain_loss)
        for gradient, plain in zip(gradients, plain_gradients, strict=True):
            assert (gradient is None) == (plain is None)
            assert gradient is None or torch.equal(gradient, plain)


@contextmanager
def capturing(model: QSTModel) -> Iterator[StandInGraphs]:
    model.captured_passes, device = stand_in_passes()
    yield device


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "side",
    [{}, {"dropout": 0.3}, {"variant": "authors"}, {"lora_layers": 1}, {"hidden_bits": 8}],
    ids=lambda side: "-".join(side) or "default",
)
def test_losses_and_gradients_of_all_steps_are_those_of_plain_passes(side, accumulation):
    batches = [batch(shape, number) for number, shape in enumerate(SHAPES)]
    plain = steps(tiny_model(**side), batches, accumulation)
    model = tiny_model(**side)
    with capturing(model) as device:
        assert_equal(steps(model, batches, accumulation), plain)
    assert device.num_records == (2 + 1) * 2  # to train and to validate, 2 x 11 and 2 x 16
    assert device.num_replays == (2 + 1) * (4 + 2)  # each is compared once
    assert model.side.recompute


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "side", [{}, {"dropout": 0.3}, {"lora_layers": 1}], ids=lambda side: "-".join(side) or "default"
)
def test_on_a_gpu_graphs_give_the_same_bits(side, autocast):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    batches = [batch(shape, number) for number, shape in enumerate(SHAPES)]
    plain = steps(tiny_model("cuda", **side), batches, autocast=lambda _: autocast)
    model = tiny_model("cuda", **side)
    model.captured_passes = CapturedPasses()
    assert_equal(steps(model, batches, autocast=lambda _: autocast), plain)
    assert model.captured_passes.fault is None
    assert len(model.captured_passes.passes) == 4


@pytest.mark.parametrize("lora_layers", [0, 2])
@pytest.mark.parametrize(
    "autocast", [lambda _: True, lambda number: number % 2 == 0], ids=["always", "by turns"]
)
def test_a_callers_autocast_keeps_no_weight_of_an_earlier_step(autocast, lora_layers):
    batches = [batch((2, 11), number) for number in range(10)]
    plain = steps(tiny_model(lora_layers=lora_layers), batches, autocast=autocast)
    model = tiny_model(lora_layers=lora_layers)
    with capturing(model) as device:
        assert_equal(steps(model, batches, autocast=autocast), plain)
    # A forward and a backward pass, and one of validation, after two plain ones of each kind.
    kinds = {autocast(number) for number in range(10)}
    assert device.num_replays >= 10 + 2 * (10 - 2 * len(kinds)) - 2
    assert model.captured_passes.fault is None


def test_masks_and_positions_are_inputs_of_a_pass_not_part_of_it():
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 9, 9)
    windows = [causal & causal.triu(-n).to(torch.bool) for n in (8, 3, 2, 4, 1)]
    positions = [torch.arange(9).expand(2, 9) + n for n in (0, 2, 4, 6, 8)]
    batches = [
        batch((2, 9), number, mask=mask, input_pos=position)
        for number, (mask, position) in enumerate(zip(windows, positions, strict=True))
    ]
    plain = steps(tiny_model(), batches)
    model = tiny_model()
    with capturing(model) as device:
        assert_equal(steps(model, batches), plain)
    assert device.num_replays == 3 * (3 + 1)


def test_a_captured_run_that_was_resumed_has_the_bytes_of_a_plain_one(tmp_path, monkeypatch):
    config = finetune_config(tmp_path)
    settings = ("model.dropout=0.1", "epochs=7", "shuffle=False")
    plain = finetune(config, tmp_path / "plain", *settings)

    devices = []

    def load_and_capture(*args: Any, **kwargs: Any) -> Any:
        method = load_qst(*args, **kwargs)
        method.model.captured_passes, device = stand_in_passes()
        devices.append(device)
        return method

    monkeypatch.setattr("qst_tune.recipes.qst_finetune.load_qst", load_and_capture)
    finetune(config, tmp_path / "run", *settings, "epochs=4")
    resumed = finetune(config, tmp_path / "run", *settings, "resume_from_checkpoint=True")
    assert [device.num_replays > 0 for device in devices] == [True, True]
    assert torch.equal(resumed.train_loss, plain.train_loss)
    assert resumed.val_loss == plain.val_loss
    assert resumed.weights_file.read_bytes() == plain.weights_file.read_bytes()


def test_a_reference_model_is_captured_with_the_one_that_trains():
    def run(model: QSTModel) -> list[torch.Tensor]:
        model.keep_reference()
        randomize_(model.reference_side)
        found = []
        for number in range(4):
            tokens = batch((2, 9), number)["tokens"]
            outputs = model.with_reference(tokens)
            (outputs[0] - outputs[1]).square().sum().backward()
            found += [*(o.detach() for o in outputs), model.side.gates[0].gamma.grad.clone()]
        return found

    plain = run(tiny_model())
    model = tiny_model()
    with capturing(model) as device:
        found = run(model)
    assert device.num_replays == 2 * (2 + 1)
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def test_a_pass_that_comes_before_the_backward_of_another_runs_plainly():
    def gradient(model: QSTModel, captured: bool) -> torch.Tensor:
        if captured:
            model.captured_passes, _ = stand_in_passes()
        tokens = [batch((2, 9), number)["tokens"] for number in range(5)]
        for given in tokens[:3]:
            model(given).sum().backward()
        model.zero_grad()
        (model(tokens[3]).sum() * model(tokens[4]).sum()).backward()
        return model.side.upsample.weight.grad

    assert torch.equal(gradient(tiny_model(), True), gradient(tiny_model(), False))


def passes_taken(model: QSTModel, batches: list[dict[str, Any]]) -> int:
    """How many of the batches were replayed."""
    with capturing(model) as device:
        steps(model, batches)
    return (device.num_replays - device.num_records) // 3  # forward, backward, validation


def test_only_small_plain_training_passes_of_repeated_shapes_are_captured():
    same = [batch((2, 9), number) for number in range(PLAIN_PASSES + 2)]
    assert passes_taken(tiny_model(), same) == 2
    assert passes_taken(tiny_model(), same[:PLAIN_PASSES]) == 0
    with mock.patch(f"{MODULE}.MOST_TOKENS", 17):
        assert passes_taken(tiny_model(), same) == 0
    with mock.patch("qst_tune.modules.qst_model.MOST_TOKENS_WITH_LORA", 17):
        assert passes_taken(tiny_model(), same) == 2
        assert passes_taken(tiny_model(lora_layers=1), same) == 0
    with mock.patch(f"{MODULE}.MOST_SHAPES", 2):
        other = [batch((2, 10), number) for number in range(PLAIN_PASSES + 2)]
        assert passes_taken(tiny_model(), same + other) == 2
    with capturing(drops_again := tiny_model(lora_layers=1, lora_dropout=0.1)) as device:
        steps(drops_again, same)
    assert device.num_records == 1  # of validation: backward would have to draw again
    disabled = tiny_model()
    disabled.side.disabled = True
    with capturing(disabled) as device:
        for given in same:
            disabled(given["tokens"])
    assert device.num_records == 0


def test_packed_rows_with_a_block_mask_are_not_captured():
    model, (passes, device) = tiny_model(), stand_in_passes()
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, device="cpu")
    for number in range(4):
        tokens = batch((2, 9), number)["tokens"]
        passes.run(lambda tokens, mask: (), lambda: (), [model.side], (), tokens, mask=mask)
    assert device.num_records == 0


def test_parameters_that_moved_are_captured_anew():
    model, batches = tiny_model(), [batch((2, 9), number) for number in range(4)]
    with capturing(model) as device:
        steps(model, batches)
        weight = model.side.upsample.weight
        weight.data = weight.data * 2
        found = steps(model, batches)
        assert device.num_records == 2 * 3
        model.captured_passes = None
    plain_model = tiny_model()
    steps(plain_model, batches)
    plain_model.side.upsample.weight.data *= 2
    assert_equal(found, steps(plain_model, batches))


class Broken(StandInGraphs):
    """A device that cannot record, and says so in the middle of it."""

    def record(self, work):
        work()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_model_that_cannot_be_captured_goes_on_after_one_warning():
    batches = [batch((2, 9), number) for number in range(6)]
    plain = steps(tiny_model(dropout=0.3), batches)
    model = tiny_model(dropout=0.3)
    model.captured_passes = CapturedPasses(lambda device: Broken())
    with mock.patch(f"{MODULE}.log") as log:
        assert_equal(steps(model, batches), plain)
    assert model.captured_passes.fault.startswith("operation not permitted (RuntimeError in test_")
    assert log.warning.call_count == 1
    assert model.captured_passes.fault in log.warning.call_args.args[0]
    assert not model.captured_passes.passes


def test_a_plain_pass_without_memory_gets_that_of_the_graphs():
    same = [batch((2, 9), number) for number in range(PLAIN_PASSES + 1)]
    batches = [*same, batch((2, 12), 9), same[0]]
    plain = steps(tiny_model(), batches)
    model, (passes, _) = tiny_model(), stand_in_passes()
    model.captured_passes = passes

    def need_memory(module: Any, args: Any) -> None:
        if args[0].shape[1] == 12 and passes.passes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    model.layers[1].register_forward_pre_hook(need_memory)
    assert_equal(steps(model, batches), plain)
    assert passes.fault.startswith("CUDA out of memory. Tried to allocate 2 GiB (OutOfMemoryError")
    assert not passes.passes


class Wrong(StandInGraphs):
    """A device whose records do not do what was recorded."""

    def record(self, work):
        replay = super().record(work)

        def replay_with_other_numbers():
            torch.rand(1)
            replay()

        return replay_with_other_numbers


def test_a_record_that_gives_other_values_is_not_used():
    batches = [batch((2, 9), number) for number in range(5)]
    plain = steps(tiny_model(dropout=0.3), batches)
    model = tiny_model(dropout=0.3)
    model.captured_passes = CapturedPasses(lambda device: Wrong())
    assert_equal(steps(model, batches), plain)
    assert model.captured_passes.fault.startswith("a recorded pass gives other values")


def test_over_a_model_of_transformers_padding_is_an_input_of_a_pass_too():
    def run(captured: bool, padded: bool) -> list[Step]:
        torch.manual_seed(0)
        model = qst_decoder(
            TransformersBackbone(tiny_model_of("llama")), base_quantization="none",
            reduction_factor=4,
        ).train()  # fmt: skip
        randomize_(model.side)
        if captured:
            model.captured_passes, _ = stand_in_passes()
        batches = []
        for number in range(5):
            mask = torch.ones(2, 9, dtype=torch.bool)
            mask[0, : number + 1] = False
            batches.append(batch((2, 9), number, **({"mask": mask} if padded else {})))
        return steps(model, batches)

    for padded in (False, True):
        assert_equal(run(True, padded), run(False, padded))


@pytest.mark.gpu
def test_on_a_gpu_a_recording_that_fails_leaves_random_numbers_as_they_were():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def wait_in_records(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.ones(1, device="cuda").item()

    batches = [batch((2, 9), number) for number in range(5)]
    plain = steps(tiny_model("cuda", dropout=0.3), batches)
    model = tiny_model("cuda", dropout=0.3)
    model.captured_passes = CapturedPasses()
    model.layers[1].register_forward_hook(wait_in_records)
    assert_equal(steps(model, batches), plain)
    assert model.captured_passes.fault is not None
    model = tiny_model("cuda", dropout=0.3)
    model.captured_passes = CapturedPasses()
    assert_equal(steps(model, batches), plain)
    assert model.captured_passes.fault is None


@pytest.mark.gpu
def test_on_a_gpu_a_model_that_waits_for_the_device_runs_as_before():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    batches = [batch((2, 9), number) for number in range(5)]
    plain = steps(tiny_model("cuda", dropout=0.3), batches)
    model = tiny_model("cuda", dropout=0.3)
    model.captured_passes = CapturedPasses()
    model.layers[1].register_forward_hook(lambda *_: torch.ones(1, device="cuda").item() and None)
    assert_equal(steps(model, batches), plain)
    assert model.captured_passes.fault is not None
