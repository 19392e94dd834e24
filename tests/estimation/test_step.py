"""The estimate of a step of a config's own model against what real steps allocate."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.estimation.step import Setup, Shape, StepCost, own_setup, trace_step
from qst_tune.modules.nf4_linear import NF4Linear
from tests.support.model_types import tiny_config
from tests.support.real_step import (
    MODELS,
    estimated_step_bytes,
    measured_step_bytes,
    training_config,
)

TINY = {
    "_component_": "qst_tune.models.qst_llama2",
    "vocab_size": 320,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "max_seq_len": 256,
    "intermediate_dim": 256,
}
PEQA = {**TINY, "_component_": "qst_tune.models.peqa_llama2"}
QST = {**TINY, "reduction_factor": 4}
CLASSIFIER = {
    **{name: value for name, value in QST.items() if name != "_component_"},
    "_component_": "qst_tune.models.qst_classifier",
    "backbone": "torchtune.models.llama2.llama2",
    "num_labels": 3,
}
DPO = {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}
CLASSES = {"loss": {"_component_": "torch.nn.CrossEntropyLoss"}}
SHAPE = Shape(2, 64)
# Of each task the model and what differs in the rest of its config.
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "QST": (QST, {}),
    "QST, recomputed": (QST, {"enable_activation_checkpointing": True}),
    "LST": ({**QST, "base_quantization": "none"}, {}),
    "PEQA": (PEQA, {}),
    "PEQA, checkpointed": (PEQA, {"enable_activation_checkpointing": True}),
    "QST, classifier": (CLASSIFIER, CLASSES),
    "QST, score": ({**CLASSIFIER, "num_labels": 1}, {"loss": {"_component_": "torch.nn.MSELoss"}}),
    "QST, repaired": ({**QST, "repair_rank": 8}, {}),
    "QST, DPO": (QST, DPO),
    "QST, DPO from a start": (QST, {**DPO, "reference": "start", "side_network": "<DIR>"}),
}


def config(model: dict[str, Any], **changes: Any) -> Any:
    return training_config(model, **changes)


def setup_of(cfg: Any) -> Setup:
    return own_setup(cfg, torch.bfloat16)


def estimate(cfg: Any, *, shape: Shape = SHAPE, device: Any = "cuda", **how: Any) -> StepCost:
    return trace_step(setup_of(cfg), cfg, shape, device=device, **how)[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_estimated_and_its_parts_add_up(task: str, device: str) -> None:
    model, changes = TASKS[task]
    cfg = config(model, **changes)
    cost = estimate(cfg, device=device)
    assert sum(cost.memory.parts.values()) == cost.memory.num_bytes > 0
    assert cost.flops_per_token > 0
    assert cost.trainable_parameters > 0
    assert setup_of(cfg).title == {
        "LST": "QST",
        "QST, repaired": "QST",
        "QST, score": "QST, classifier",
    }.get(task, task.removesuffix(" from a start"))


@pytest.mark.parametrize("shape", [Shape(1, 128), Shape(2, 512), Shape(4, 256)], ids=str)
@pytest.mark.parametrize("task", ["QST", "QST, recomputed", "PEQA, checkpointed", "QST, DPO"])
def test_estimate_agrees_with_a_real_step(task: str, shape: Shape) -> None:
    """Larger models and other methods are in tests/support/real_step.py, for minutes."""
    model = {**MODELS["Llama 2, narrow"], "num_layers": 2}
    if task.startswith("PEQA"):
        model["_component_"] = "qst_tune.models.peqa_llama2"
        model.pop("reduction_factor")
    cfg = config(model, **TASKS[task][1])
    real = measured_step_bytes(setup_of(cfg), cfg, shape)
    assert estimated_step_bytes(setup_of(cfg), cfg, shape) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("over_transformers", [False, True], ids=["torchtune", "transformers"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("lora_layers", "loss"), [(1, {}), (2, DPO), (4, {})], ids=str)
def test_estimate_agrees_with_a_real_step_with_lora(
    lora_layers: int, loss: dict[str, Any], recompute: bool, over_transformers: bool, tmp_path: Path
) -> None:
    model = {**MODELS["Llama 2, narrow"], "num_layers": 4}
    if over_transformers:
        widths = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "vocab_size": 4000}
        tiny_config("llama", num_hidden_layers=4, **widths).save_pretrained(tmp_path)
        builder = "qst_tune.models.qst_from_hf"
        model = {"_component_": builder, "checkpoint_dir": str(tmp_path), "reduction_factor": 4}
    model = {**model, "num_side_blocks": 2, "lora_layers": lora_layers}
    cfg = config(model, enable_activation_checkpointing=recompute, **loss)
    shape = Shape(2, 256)
    real = measured_step_bytes(setup_of(cfg), cfg, shape)
    assert estimated_step_bytes(setup_of(cfg), cfg, shape) == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_estimate_agrees_with_a_real_step_of_rows_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qst_tune.training.task.TOKENS_AT_ONCE", 256)
    model = {**MODELS["Llama 2, narrow"], "num_layers": 2, "lora_layers": 1}
    cfg = config(model, enable_activation_checkpointing=True)
    real = measured_step_bytes(setup_of(cfg), cfg, Shape(9, 128))  # five parts, the last of one row
    estimate = estimated_step_bytes(setup_of(cfg), cfg, Shape(9, 128))
    assert estimate == pytest.approx(real, rel=0.05)
    one = estimated_step_bytes(setup_of(cfg), cfg, Shape(2, 128))
    assert estimate < 1.5 * one


def test_estimate_agrees_with_a_real_step_over_a_quantised_embedding() -> None:
    settings = {"vocab_size": 20_000, "embedding_quantization": "int8"}  # three parts of rows
    cfg = config(
        {**MODELS["Llama 2, narrow"], "num_layers": 1, **settings},
        enable_activation_checkpointing=True,
    )
    shape = Shape(1, 64)
    real = measured_step_bytes(setup_of(cfg), cfg, shape)
    assert estimated_step_bytes(setup_of(cfg), cfg, shape) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_quantised_embedding_is_counted_as_it_is_stored(
    device: str,
) -> None:
    def frozen(**changes: Any) -> int:
        cost = estimate(config({**QST, **changes}), device=device)
        return cost.memory.parts["frozen weights"]

    weights, scales = 2 * 320 * 128, 2 * 320 * 4
    saved = weights - scales
    # CUDA rounds blocks up.
    assert frozen() - frozen(embedding_quantization="int8") == pytest.approx(saved, abs=4 * 512)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_repair_is_counted_with_its_products(device: str) -> None:
    plain = estimate(config(QST), device=device)
    repaired = estimate(config({**QST, "repair_rank": 8}), device=device)
    # Of each layer two of 128 x 128, two of 64 x 128, and three between 128 and 256.
    factors = 2 * 8 * (2 * (128 + 128) + 2 * (64 + 128) + 3 * (128 + 256))
    added = repaired.memory.parts["frozen weights"] - plain.memory.parts["frozen weights"]
    assert added == pytest.approx(2 * factors, abs=2 * 7 * 2 * 512)  # CUDA rounds blocks up
    assert repaired.flops_per_token - plain.flops_per_token == 2 * factors
    assert repaired.memory.parts["saved activations"] == plain.memory.parts["saved activations"]


def test_nothing_fake_is_left_behind() -> None:
    """Tables that are kept between calls must still be real."""
    estimate(config(QST), device="cpu")
    y = NF4Linear(torch.randn(64, 64, dtype=torch.bfloat16))(
        torch.ones(1, 64, dtype=torch.bfloat16)
    )
    assert y.abs().sum().item() > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fp4_costs_what_nf4_does(device: str) -> None:
    fp4 = estimate(config({**QST, "base_quantization": "fp4"}), device=device)
    assert fp4.memory.parts == estimate(config(QST), device=device).memory.parts


def test_recomputation_saves_memory_and_costs_no_backbone_operations() -> None:
    stored = estimate(config(QST))
    recomputed = estimate(config(QST, enable_activation_checkpointing=True))
    assert recomputed.memory.saved_bytes < stored.memory.saved_bytes
    assert recomputed.flops_per_token < 1.5 * stored.flops_per_token


@pytest.mark.parametrize(("bits", "published"), [(4, 33e9), (3, 25e9)])
def test_weights_of_llama_65b_are_those_of_the_peqa_paper(bits: int, published: float) -> None:
    """Of two small numbers of layers, since weights are affine in it; the paper's gigabytes."""

    def weights(num_layers: int) -> int:
        sizes = {"num_heads": 64, "num_kv_heads": 64, "embed_dim": 8192, "intermediate_dim": 22016}
        model = {**PEQA, **sizes, "vocab_size": 32_000, "num_layers": num_layers, "bits": bits}
        parts = estimate(config(model), shape=Shape(1, 8)).memory.parts
        return parts["frozen weights"] + parts["trainable weights"]

    one, two = weights(1), weights(2)
    assert one + 79 * (two - one) == pytest.approx(published, rel=0.05)


def test_a_peqa_config_has_its_scales_to_train() -> None:
    width, kv, inner = 128, 64, 256
    shapes = [(width, width)] * 2 + [(kv, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    scales = 2 * sum(o * i // 32 for o, i in shapes)
    assert estimate(config({**PEQA, "group_size": 32})).trainable_parameters == scales


def test_checkpointed_peqa_keeps_less() -> None:
    plain = estimate(config(PEQA))
    checkpointed = estimate(config(PEQA, enable_activation_checkpointing=True))
    assert checkpointed.memory.saved_bytes < plain.memory.saved_bytes / 3


def test_longer_rows_than_the_model_sees_are_refused() -> None:
    with pytest.raises(UserError, match=r"max_seq_len=257 is longer than the model's .* 256"):
        estimate(config(QST), shape=Shape(1, 257))


def test_a_model_of_no_method_of_ours_is_refused() -> None:
    plain = {**TINY, "_component_": "torchtune.models.llama2.llama2"}
    with pytest.raises(UserError, match="builds neither a QST nor a PEQA model"):
        setup_of(config(plain))


def test_a_loss_that_fits_no_task_is_refused() -> None:
    with pytest.raises(UserError, match="MSELoss does not learn from pairs"):
        setup_of(config(QST, loss={"_component_": "torch.nn.MSELoss"}))
