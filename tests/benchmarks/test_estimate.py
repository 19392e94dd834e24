"""Estimates of others' methods: torchtune's builders against our peers, and the command."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import set_default_dtype

from benchmarks import estimate as command
from benchmarks.estimate import METHODS, torchtune_setup
from qst_tune.estimation.step import Setup, Shape, StepCost, trace_step
from tests.estimation.test_step import PEQA, QST, TINY
from tests.support.real_step import (
    COMPARED,
    MODELS,
    estimated_step_bytes,
    measured_step_bytes,
    training_config,
)

SHAPE = Shape(2, 64)
CONFIG = training_config(QST)


def cost_of(setup: Setup, shape: Shape = SHAPE, **how: Any) -> StepCost:
    return trace_step(setup, CONFIG, shape, device="cuda", **how)[0]


def estimate(name: str, cfg: Any = CONFIG, *, shape: Shape = SHAPE, **how: Any) -> StepCost:
    return cost_of(METHODS[name](cfg), shape, **how)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_its_parts_add_up(name: str) -> None:
    cost = estimate(name)
    assert sum(cost.memory.parts.values()) == cost.memory.num_bytes > 0
    assert cost.flops_per_token > 0
    assert cost.trainable_parameters > 0


@pytest.mark.parametrize("shape", [Shape(1, 128), Shape(2, 512)], ids=str)
@pytest.mark.parametrize("name", [name for name in COMPARED if "qlora" in name])
def test_estimate_agrees_with_a_real_step(name: str, shape: Shape) -> None:
    cfg = training_config({**MODELS["Llama 2, narrow"], "num_layers": 2})
    real = measured_step_bytes(METHODS[name](cfg), cfg, shape)
    assert estimated_step_bytes(METHODS[name](cfg), cfg, shape) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("quantize", [False, True])
def test_our_lora_is_what_torchtunes_builder_makes(
    quantize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LORA_RANK", 4)
    sizes = {k: v for k, v in TINY.items() if k != "_component_"}
    sizes["num_kv_heads"] = 4  # torchao's fixed block sizes need [128, 128]
    with set_default_dtype(torch.bfloat16), torch.device("meta"):
        model = lora_llama2(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            lora_rank=4,
            lora_alpha=8,
            quantize_base=quantize,
            **sizes,
        )
    set_trainable_params(model, get_adapter_params(model))
    theirs = cost_of(torchtune_setup(model, checkpointing=False))
    cfg = training_config({**QST, **sizes})
    ours = estimate("qlora" if quantize else "lora", cfg)
    assert ours.flops_per_token == theirs.flops_per_token
    assert ours.trainable_parameters == theirs.trainable_parameters
    assert ours.memory.saved_bytes == theirs.memory.saved_bytes
    # Theirs has a rotary cache in every layer, ours shares one, so only the step's own bytes agree.
    assert _step_bytes(ours) == _step_bytes(theirs)


def _step_bytes(cost: StepCost) -> int:
    return cost.memory.num_bytes - cost.memory.start_bytes


def test_full_fine_tuning_counts_weights_gradients_and_two_states() -> None:
    cost = estimate("full", shape=Shape(1, 8))
    weights = 2 * cost.trainable_parameters
    parts = cost.memory.parts
    assert parts["trainable weights"] == pytest.approx(weights, rel=0.02)
    assert parts["optimizer states"] == pytest.approx(2 * weights, rel=0.05)
    assert parts["gradients"] == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize(
    "model",
    [
        {**QST, "embedding_quantization": "int8", "base_quantization": "fp4"},
        {**PEQA, "group_size": 32},
    ],
    ids=["QST", "PEQA"],
)
def test_a_config_decides_what_its_own_method_is_and_not_what_the_others_are(model: Any) -> None:
    assert estimate("qlora", training_config(model)) == estimate("qlora")
    assert METHODS["qst"](training_config(model)).model.side is not None


def test_checkpointed_qlora_keeps_less_and_costs_another_forward() -> None:
    plain, checkpointed = estimate("qlora"), estimate("qlora_checkpointed")
    assert checkpointed.memory.saved_bytes < plain.memory.saved_bytes / 3
    assert checkpointed.flops_per_token > 1.3 * plain.flops_per_token


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 2, "num_side_blocks": 1, "reduction_factor": 2},
        {"embedding_quantization": "int8"},
        {"base_quantization": "int8", "output_mix": "residual", "normalize_hidden": True},
        {"min_head_dim": 8, "initial_gamma": 0.5},
    ],
    ids=str,
)
def test_what_a_config_chooses_is_not_what_was_published(settings: dict[str, Any]) -> None:
    cfg = training_config({**QST, **settings})
    assert estimate("qst_published", cfg) == estimate("qst_published")
    assert estimate("qst", cfg) != estimate("qst")


def test_plain_attention_holds_the_scores() -> None:
    plain = estimate("qlora", attention="plain").memory.saved_bytes
    extra = plain - estimate("qlora").memory.saved_bytes
    scores = 2 * 2 * 4 * 64 * 64  # of two layers, two rows, four heads
    assert extra == pytest.approx(scores * 2, rel=0.2)  # the softmax, in bf16


def test_memory_is_affine_in_the_batch() -> None:
    a, b, c = (estimate("qlora", shape=Shape(n, 64)).memory.num_bytes for n in (4, 8, 12))
    assert c - b == pytest.approx(b - a, rel=0.02)


def test_quantised_weights_are_frozen_and_adapters_train() -> None:
    model = METHODS["qlora"](CONFIG).model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name for name in trained)


SIZES = ["batch_size=1", "tokenizer.max_seq_len=16"]


@pytest.mark.slow
def test_the_command_prints_a_row_a_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(CONFIG.raw, path)
    given = ["--config", str(path), "--methods", "qst,qlora", "--fit-gib", "0.01"]
    assert command.main([*given, *SIZES]) == 0
    head, columns, ours, theirs, fits = capsys.readouterr().out.strip().splitlines()
    assert head.startswith(f"{path}, 1 x 16 tokens")
    assert columns.split()[:2] == ["method", "peak"]
    assert ours.split()[0] == "qst"
    assert theirs.split()[0] == "qlora"
    assert re.fullmatch(r"largest batch that fits in 0.01 GiB: qst \d+, qlora \d+", fits)


def test_the_command_takes_a_shipped_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--config", "smollm2/135M_qst", "--methods", "qst", *SIZES]) == 0
    assert capsys.readouterr().out.startswith("smollm2/135M_qst, 1 x 16 tokens")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "qlorra"], "error: --methods: 'qlorra' is unknown; known: qst, "),
        (["--config", "absent"], "error: "),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
