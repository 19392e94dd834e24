"""A step of one layer of each kind, filled up, is the step of all layers: to the byte."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qst_tune.estimation.skipped_layers import skip, stand_ins, with_skipped
from qst_tune.estimation.step import Setup, Shape, own_setup, trace_step
from qst_tune.estimation.tracker import Segment, Timeline
from tests.estimation.test_step import DPO, QST
from tests.support.model_types import tiny_config
from tests.support.real_step import training_config

DEEP = {**QST, "num_layers": 9, "num_side_blocks": 2}  # blocks behind layers 3 and 8
SHAPE = Shape(3, 32)


def check(model: dict[str, Any], least_skipped: int, **changes: Any) -> None:
    cfg = training_config(model, **changes)

    def build() -> Setup:
        return own_setup(cfg, torch.bfloat16)

    skipped = stand_ins(build().model)
    assert len(skipped) >= least_skipped
    whole = trace_step(build(), cfg, SHAPE, device="cuda")[1]
    few = partial(skip, layers=list(skipped))
    step = with_skipped(trace_step(build(), cfg, SHAPE, device="cuda", shorten=few)[1], skipped)
    assert [phase for phase, _ in step.phases] == [phase for phase, _ in whole.phases]
    assert step.peaks() == whole.peaks()
    assert step.flops == whole.flops
    assert step.start_bytes == whole.start_bytes


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("lora_layers", "least_skipped"),
    [
        (0, 4),
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(6, 2, marks=pytest.mark.slow),
        (9, 3),
    ],
)
def test_filled_steps_are_whole_ones(lora_layers: int, least_skipped: int, recompute: bool) -> None:
    model = {**DEEP, "lora_layers": lora_layers}
    check(model, least_skipped, enable_activation_checkpointing=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("side", [{"num_side_blocks": 0}, {"lora_attn_modules": ["q_proj"]}])
def test_so_are_those_of_lora_alone_and_in_few_linears(side: dict[str, Any]) -> None:
    check({**DEEP, "lora_layers": 7, **side}, 2, enable_activation_checkpointing=True)


@pytest.mark.slow
def test_so_are_those_of_preferences() -> None:
    check({**DEEP, "lora_layers": 6}, 2, enable_activation_checkpointing=True, **DPO)


@pytest.mark.parametrize("model_type", [pytest.param("llama", marks=pytest.mark.slow), "qwen3_moe"])
@pytest.mark.parametrize(
    "loss",
    [pytest.param({}, id="labels"), pytest.param(DPO, id="preferences", marks=pytest.mark.slow)],
)
def test_so_are_those_over_transformers(
    model_type: str, loss: dict[str, Any], tmp_path: Path
) -> None:
    tiny_config(model_type, num_hidden_layers=9).save_pretrained(tmp_path)
    model = {
        "_component_": "qst_tune.models.qst_from_hf",
        "checkpoint_dir": str(tmp_path),
        "reduction_factor": 4,
        "num_side_blocks": 2,
        "lora_layers": 6,
    }
    check(model, 2, enable_activation_checkpointing=True, **loss)


@pytest.mark.slow
def test_rows_that_run_in_turn_are_filled_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qst_tune.training.task.TOKENS_AT_ONCE", 32)
    check({**DEEP, "lora_layers": 6}, 2, enable_activation_checkpointing=True)


def test_skipped_layers_stand_between_those_that_ran() -> None:
    def one(phase: Any, layer: int | None, change: int) -> Segment:
        return Segment(phase, layer, [change], 1)

    ran = [
        one("forward", None, 1),
        *(one("forward", layer, 10 + layer) for layer in (0, 1, 4)),
        *(one("backward", layer, 20 + layer) for layer in (4, 1, 0)),
    ]
    filled = with_skipped(Timeline(5, [], ran), {2: 1, 3: 1})
    assert filled.phases == [
        ("forward", [1, 10, 11, 11, 11, 14]),
        ("backward", [24, 21, 21, 21, 20]),
    ]
    assert filled.flops == 11
