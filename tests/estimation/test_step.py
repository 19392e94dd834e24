"""The estimate against what real steps allocate, and torchtune's builders against our peers."""

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import training
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from qst_tune.errors import UserError
from qst_tune.estimation.methods import (
    DEFAULT_METHODS,
    METHODS,
    Choices,
    Method,
    Setup,
    choose_methods,
)
from qst_tune.estimation.step import Shape, estimate_step
from qst_tune.modules.nf4_linear import NF4Linear
from tests.estimation.real_step import (
    COMPARED,
    MODELS,
    estimated_step_bytes,
    measured_step_bytes,
    training_config,
)

TINY = {
    "vocab_size": 320,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "max_seq_len": 256,
    "intermediate_dim": 256,
}
CONFIG = training_config(
    {"_component_": "qst_tune.models.qst_llama2", "reduction_factor": 4, **TINY}
)
CHOICES = Choices(CONFIG, torch.bfloat16, lora_rank=4)
SHAPE = Shape(2, 64)


def estimate(name, *, shape=SHAPE, device="cuda", choices=CHOICES, attention="fused"):
    return estimate_step(METHODS[name], choices, shape, device=device, attention=attention)


@pytest.mark.parametrize("shape", [Shape(1, 128), Shape(2, 512), Shape(4, 256)], ids=str)
@pytest.mark.parametrize("method", COMPARED)
def test_estimate_agrees_with_a_real_step(method, shape):
    """The other models are in tests/estimation/real_step.py, which takes minutes."""
    model = {**MODELS["Llama 2, narrow"], "num_layers": 2}
    cfg = training_config(model)
    real = measured_step_bytes(method, cfg, shape)
    assert estimated_step_bytes(method, cfg, shape) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_estimate_agrees_with_a_real_step_over_a_quantised_embedding(form):
    settings = {"vocab_size": 20_000, "embedding_quantization": form}  # three parts of rows
    cfg = training_config({**MODELS["Llama 2, narrow"], "num_layers": 1, **settings})
    shape = Shape(1, 64)
    real = measured_step_bytes("qst_recomputed", cfg, shape)
    assert estimated_step_bytes("qst_recomputed", cfg, shape) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("form", "bytes_a_weight"), [("int8", 1), ("nf4", 0.5 + 2 / 64)])
def test_a_quantised_embedding_is_counted_as_it_is_stored(form, bytes_a_weight, device):
    cfg = OmegaConf.merge(CONFIG, {"model": {"embedding_quantization": form}})
    choices = Choices(cfg, torch.bfloat16, lora_rank=4)
    plain = estimate("qst", device=device).memory.parts["frozen weights"]
    quantised = estimate("qst", device=device, choices=choices).memory.parts["frozen weights"]
    weights, scales = 2 * 320 * 128, 2 * 320 * 4 * (form == "int8")
    saved = weights * (2 - bytes_a_weight) - scales
    assert plain - quantised == pytest.approx(saved, abs=4 * 512)  # CUDA rounds blocks up
    assert estimate("qlora", choices=choices) == estimate("qlora")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_method_runs_and_its_parts_add_up(name, device):
    cost = estimate(name, device=device)
    assert sum(cost.memory.parts.values()) == cost.memory.num_bytes > 0
    assert cost.flops_per_token > 0
    assert cost.trainable_parameters > 0


def test_nothing_fake_is_left_behind():
    """Tables that are kept between calls must still be real."""
    estimate("qst", device="cpu")
    y = NF4Linear(torch.randn(64, 64, dtype=torch.bfloat16))(
        torch.ones(1, 64, dtype=torch.bfloat16)
    )
    assert y.abs().sum().item() > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fp4_costs_what_nf4_does_and_peers_share_its_backbone(device):
    cfg = OmegaConf.merge(CONFIG, {"model": {"base_quantization": "fp4"}})
    choices = Choices(cfg, torch.bfloat16, lora_rank=4)
    for name in ("qst", "lora"):
        fp4 = estimate(name, device=device, choices=choices)
        assert fp4.memory.parts == estimate(name, device=device).memory.parts


@pytest.mark.parametrize("quantize", [False, True])
def test_our_lora_is_what_torchtunes_builder_makes(quantize):
    sizes = {**TINY, "num_kv_heads": 4}  # torchao's fixed block sizes need [128, 128]

    def build(choices: Choices) -> Setup:
        with training.set_default_dtype(torch.bfloat16), torch.device("meta"):
            model = lora_llama2(
                lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
                apply_lora_to_mlp=True,
                lora_rank=4,
                lora_alpha=8,
                quantize_base=quantize,
                **sizes,
            )
        set_trainable_params(model, get_adapter_params(model))
        loss = CEWithChunkedOutputLoss()
        model.set_num_output_chunks(loss.num_output_chunks)
        return Setup(model, loss, lambda: [p for p in model.parameters() if p.requires_grad])

    cfg = OmegaConf.merge(CONFIG, {"model": sizes})
    choices = Choices(cfg, torch.bfloat16, lora_rank=4)
    theirs = estimate_step(Method("", build), choices, SHAPE, device="cuda")
    ours = estimate("qlora" if quantize else "lora", choices=choices)
    assert ours.flops_per_token == theirs.flops_per_token
    assert ours.trainable_parameters == theirs.trainable_parameters
    assert ours.memory.saved_bytes == theirs.memory.saved_bytes
    # Theirs has a rotary cache in every layer, ours shares one, so only the step's own bytes agree.
    assert _step_bytes(ours) == _step_bytes(theirs)


def _step_bytes(cost):
    return cost.memory.num_bytes - cost.memory.start_bytes


def test_full_fine_tuning_counts_weights_gradients_and_two_states():
    cost = estimate("full", shape=Shape(1, 8))
    weights = 2 * cost.trainable_parameters
    parts = cost.memory.parts
    assert parts["trainable weights"] == pytest.approx(weights, rel=0.02)
    assert parts["optimizer states"] == pytest.approx(2 * weights, rel=0.05)
    assert parts["gradients"] == pytest.approx(weights, rel=0.05)


def test_recomputation_saves_memory_and_costs_no_backbone_operations():
    stored, recomputed = estimate("qst_stored"), estimate("qst_recomputed")
    assert recomputed.memory.saved_bytes < stored.memory.saved_bytes
    assert recomputed.flops_per_token < 1.5 * stored.flops_per_token


PEQA = {**TINY, "_component_": "qst_tune.models.peqa_llama2"}


@pytest.mark.parametrize(("bits", "published"), [(4, 33e9), (3, 25e9)])
def test_weights_of_llama_65b_are_those_of_the_peqa_paper(bits, published):
    """Of two small numbers of layers, since weights are affine in it; the paper's gigabytes."""

    def weights(num_layers):
        sizes = {"num_heads": 64, "num_kv_heads": 64, "embed_dim": 8192, "intermediate_dim": 22016}
        model = {**PEQA, **sizes, "vocab_size": 32_000, "num_layers": num_layers, "bits": bits}
        choices = Choices(training_config(model), torch.bfloat16, lora_rank=4)
        parts = estimate("peqa", shape=Shape(1, 8), choices=choices).memory.parts
        return parts["frozen weights"] + parts["trainable weights"]

    one, two = weights(1), weights(2)
    assert one + 79 * (two - one) == pytest.approx(published, rel=0.05)


def test_a_peqa_config_decides_what_peqa_is_and_not_what_the_others_are():
    choices = Choices(training_config({**PEQA, "group_size": 32}), torch.bfloat16, lora_rank=4)
    width, kv, inner = 128, 64, 256
    shapes = [(width, width)] * 2 + [(kv, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    scales = 2 * sum(o * i // 32 for o, i in shapes)
    assert estimate("peqa", choices=choices).trainable_parameters == scales
    assert estimate("qlora", choices=choices) == estimate("qlora")
    assert METHODS["qst"].build(choices).model.side is not None


def test_checkpointed_peqa_keeps_less():
    plain, checkpointed = estimate("peqa"), estimate("peqa_checkpointed")
    assert checkpointed.memory.saved_bytes < plain.memory.saved_bytes / 3


def test_checkpointed_qlora_costs_another_forward():
    plain, checkpointed = estimate("qlora"), estimate("qlora_checkpointed")
    assert checkpointed.memory.saved_bytes < plain.memory.saved_bytes / 3
    assert checkpointed.flops_per_token > 1.3 * plain.flops_per_token


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 2, "num_side_blocks": 1, "reduction_factor": 2},
        {"embedding_quantization": "int8"},
        {"base_quantization": "int8", "output_mix": "residual", "normalize_hidden": True},
        {"quantize_base": False, "hidden_bits": 4, "dropout": 0.5, "variant": "authors"},
        {"min_head_dim": 8, "initial_gamma": 0.5},
    ],
    ids=str,
)
def test_what_a_config_chooses_is_not_what_was_published(settings):
    cfg = OmegaConf.merge(CONFIG, {"model": settings})
    choices = Choices(cfg, torch.bfloat16, lora_rank=4)
    assert estimate("qst_published", choices=choices) == estimate("qst_published")
    assert estimate("qst", choices=choices) != estimate("qst")


def test_plain_attention_holds_the_scores():
    extra = (
        estimate("qlora", attention="plain").memory.saved_bytes
        - estimate("qlora").memory.saved_bytes
    )
    scores = TINY["num_layers"] * 2 * TINY["num_heads"] * 64 * 64  # of two rows
    assert extra == pytest.approx(scores * 2, rel=0.2)  # the softmax, in bf16


def test_memory_is_affine_in_the_batch():
    a, b, c = (estimate("qlora", shape=Shape(n, 64)).memory.num_bytes for n in (4, 8, 12))
    assert c - b == pytest.approx(b - a, rel=0.02)


def test_longer_rows_than_the_model_sees_are_refused():
    with pytest.raises(UserError, match=r"max_seq_len=257 is longer than the model's .* 256"):
        estimate("qst", shape=Shape(1, 257))


def test_methods_are_chosen_by_name():
    assert list(choose_methods(["qlora", "qst"])) == ["qlora", "qst"]
    assert choose_methods(["all"]) == METHODS
    assert set(DEFAULT_METHODS) <= set(METHODS)
    with pytest.raises(UserError, match="did you mean 'qlora'"):
        choose_methods(["qlorra"])


def test_quantised_weights_are_frozen_and_adapters_train():
    setup = METHODS["qlora"].build(CHOICES)
    trained = [name for name, p in setup.model.named_parameters() if p.requires_grad]
    assert len(trained) == TINY["num_layers"] * 7 * 2
    assert all("lora_" in name for name in trained)
