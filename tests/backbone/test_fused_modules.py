"""A transformers model in Triton's kernels computes what it computes in torch's operations."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from qst_tune.backbone import fused_modules
from qst_tune.backbone.fused_modules import fuse_transformers
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.modules import fused_layers
from tests.support.hf_models import CASES, hf_model, padded_batch
from tests.support.side_networks import FP32

pytest.importorskip("triton")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: True)


@pytest.mark.parametrize("case", CASES)
def test_a_model_gives_the_same(case, monkeypatch, triton_device):
    """Each has random weights, norms too; half of the rows are padded."""
    backbone = TransformersBackbone(hf_model(case).to(triton_device))
    tokens, mask = (t.to(triton_device) for t in padded_batch("right", lengths=(9, 4)))
    arguments = {"taps": (), "visit": lambda h: None, "mask": mask}
    expected = backbone.run(tokens, **arguments)
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: True)
    found = backbone.run(tokens, **arguments)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)


KINDS = {
    "llama": ("LlamaRMSNorm", (0.0, True), "LlamaMLP", True, "LlamaAttention", True),
    "qwen3": ("Qwen3RMSNorm", (0.0, True), "Qwen3MLP", True, "Qwen3Attention", True),
    "gemma2": ("Gemma2RMSNorm", (1.0, False), "Gemma2MLP", True, "Gemma2Attention", True),
    "olmo2": ("Olmo2RMSNorm", (0.0, False), "Olmo2MLP", True, "Olmo2Attention", True),
    # Cohere turns neighbouring channels and centres its norm; GPT-OSS clamps its gate.
    "cohere": ("CohereLayerNorm", None, "CohereMLP", True, "CohereAttention", False),
    "phi3": ("Phi3RMSNorm", (0.0, True), "Phi3MLP", True, "Phi3Attention", True),
    "gpt_oss": ("GptOssRMSNorm", (0.0, False), "GptOssMLP", False, "GptOssAttention", False),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_class_is_known_by_what_it_computes(name):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    norm, kind, mlp, is_gated, attention, is_rotary = KINDS[name]
    assert fused_modules._norm_kind(getattr(module, norm)) == kind
    of_two, of_one = fused_modules._is_gated, fused_modules._is_gated_jointly
    assert (of_two(getattr(module, mlp)) or of_one(getattr(module, mlp))) == is_gated
    rebound = fused_modules._with_fused_rotary(getattr(module, attention))
    assert (rebound is not None) == is_rotary


def test_a_fused_model_is_copied_and_pickled(fused, triton_device):
    model = hf_model("llama").to(triton_device)
    TransformersBackbone(model)
    tokens = torch.arange(6, device=triton_device)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            model.model.layers[0].self_attn.q_proj.weight.zero_()
            torch.testing.assert_close(one(tokens).logits, expected, **FP32)


def test_the_classes_of_transformers_are_not_changed():
    from transformers.models.llama import modeling_llama

    before = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    fuse_transformers(hf_model(next(case for case in CASES if case.startswith("llama"))))
    after = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    assert after == before
    assert modeling_llama.LlamaAttention.forward.__globals__ is vars(modeling_llama)


def test_a_norm_whose_weight_is_wider_keeps_its_dtype(fused, triton_device):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(8).to(triton_device)
    x = torch.randn(3, 8, device=triton_device).bfloat16()
    with torch.no_grad():
        expected = norm(x)
        holder = nn.ModuleList([norm])
        fuse_transformers(holder)
        assert torch.equal(norm(x), expected)
    assert expected.dtype == torch.float32
