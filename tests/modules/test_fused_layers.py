"""A frozen decoder in Triton's kernels computes what it computes in torch's operations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.gemma import gemma
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import FeedForward, TransformerDecoder

from qst_tune.models import qst_decoder
from qst_tune.modules import fused_layers, fused_trial, nf4_linear
from qst_tune.modules.fused_layers import activation_name, fuse_torchtune, gated_mlp, runs_fused
from qst_tune.quantization import kernels
from qst_tune.quantization.nf4 import dequantize_nf4
from tests.support.numbers import random_tokens, randomize_, tiny_backbone
from tests.support.side_networks import FP32, tiny_model

pytest.importorskip("triton")
SIZES = {"vocab_size": 61, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "max_seq_len": 16}
BUILDERS = {
    "llama3_2": lambda: llama3_2(**SIZES, num_kv_heads=2, intermediate_dim=48),
    "gemma": lambda: gemma(**SIZES, num_kv_heads=1, head_dim=8, intermediate_dim=48),
    "qwen2": lambda: qwen2(**SIZES, num_kv_heads=2, intermediate_dim=48),
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> dict[str, int]:
    """Let the kernels run wherever they can, and count their calls."""
    from qst_tune.modules import triton_kernels

    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: True)
    calls: dict[str, int] = {}

    def counted(name):
        kernel = getattr(triton_kernels, name)

        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return kernel(*args, **kwargs)

        return call

    for name in ("rms_norm", "rotate_pairs", "rotate_halves", "gated", "cross_entropy_"):
        monkeypatch.setattr(triton_kernels, name, counted(name))
    return calls


def random_decoder(name: str) -> TransformerDecoder:
    decoder = BUILDERS[name]()
    randomize_(decoder)
    return decoder.eval().requires_grad_(False)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_a_decoder_of_torchtune_gives_the_same(name, fused, triton_device):
    decoder = random_decoder(name).to(triton_device)
    tokens = torch.randint(61, (2, 9), device=triton_device)
    where = torch.stack([torch.arange(9), torch.arange(3, 12)]).to(triton_device)
    expected = [decoder(tokens), decoder(tokens, input_pos=where)]
    assert not fused
    fuse_torchtune(decoder)
    torch.testing.assert_close(decoder(tokens), expected[0], **FP32)
    torch.testing.assert_close(decoder(tokens, input_pos=where), expected[1], **FP32)
    rotations = {} if name == "qwen2" else {"rotate_pairs": 2 * 4}
    assert fused == {"rms_norm": 2 * 5, "gated": 2 * 2, **rotations}


@pytest.mark.parametrize("mlp_tokens", [1, 5, 6, 17, 18])
@torch.no_grad()
def test_an_mlp_in_parts_of_tokens_gives_the_same(mlp_tokens, fused, monkeypatch, triton_device):
    monkeypatch.setattr(fused_layers, "MLP_TOKENS", mlp_tokens)
    linears = [nn.Linear(*size, device=triton_device) for size in ((8, 20), (8, 20), (20, 8))]
    gate, up, down = linears
    x = torch.randn(2, 9, 8, device=triton_device)
    found = gated_mlp(lambda x: (gate(x), up(x)), down, "silu", x)
    torch.testing.assert_close(found, down(F.silu(gate(x)) * up(x)), **FP32)
    assert fused["gated"] == -(-18 // mlp_tokens)


def test_a_qst_model_gives_the_same_logits_and_gradients(fused, monkeypatch, triton_device):
    model = tiny_model().to(triton_device)
    randomize_(model.side)
    tokens = random_tokens(batch=2, length=7).to(triton_device)
    found, gradients = [], []
    for runs in (False, True):
        monkeypatch.setattr(fused_layers, "runs_fused", lambda x, runs=runs: runs)
        logits = model(tokens)
        found.append(logits.detach())
        gradients.append(torch.autograd.grad(logits.square().mean(), list(model.side.parameters())))
    assert fused["rms_norm"] > 0
    torch.testing.assert_close(*found, **FP32)
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("chunk_tokens", "mlp_tokens"), [(7, 5), (14, 100), (100, 7), (1, 1)])
@torch.no_grad()
def test_layers_in_parts_give_the_same_and_decode_a_weight_once(
    chunk_tokens, mlp_tokens, fused, monkeypatch, triton_device
):
    model = tiny_model().to(triton_device)
    randomize_(model.side)
    tokens = random_tokens(batch=3, length=7).to(triton_device)
    where = {
        "mask": torch.ones(3, 7, 7, dtype=torch.bool, device=triton_device).tril(),
        "input_pos": torch.arange(21, device=triton_device).view(3, 7) // 3,
    }
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: False)
    expected = model(tokens, **where)
    monkeypatch.setattr(fused_layers, "runs_fused", lambda x: True)
    monkeypatch.setattr(fused_layers, "MLP_TOKENS", mlp_tokens)
    model.frozen_chunk_tokens = chunk_tokens
    decodings = []

    def decode(weight):
        decodings.append(id(weight))
        return dequantize_nf4(weight)

    monkeypatch.setattr(nf4_linear, "dequantize_nf4", decode)
    torch.testing.assert_close(model(tokens, **where), expected, **FP32)
    # What runs in one part keeps nothing; on a CPU so few tokens then decode a weight row by row.
    in_parts = 4 * (chunk_tokens < 21) + 3 * (mlp_tokens < 21)
    whole = in_parts if triton_device == "cpu" else 7
    assert len(decodings) == len(set(decodings)) == len(model.layers) * whole


@pytest.mark.parametrize("chunk_tokens", [5, 100])
@torch.no_grad()
def test_a_state_that_is_not_contiguous_is_read_and_left_as_it_was(
    chunk_tokens, fused, triton_device
):
    model = tiny_model().to(triton_device)
    model.frozen_chunk_tokens = chunk_tokens
    width = model.backbone.width
    state = torch.randn(width, 2, 5, device=triton_device).permute(1, 2, 0)
    before, tokens = state.clone(), torch.zeros(2, 5, dtype=torch.int64, device=triton_device)
    shown = {"since": 1, "taps": (), "visit": lambda h: None}
    found = model.backbone.suffix(tokens, state, **shown)
    expected = model.backbone.suffix(tokens, state.contiguous(), **shown)
    torch.testing.assert_close(found, expected, **FP32)
    assert torch.equal(state, before)


@torch.no_grad()
def test_a_layer_with_a_hook_is_called(fused, triton_device):
    model = tiny_model().to(triton_device)
    seen = []
    model.layers[0].register_forward_hook(lambda *args: seen.append(len(args)))
    model(random_tokens(batch=2, length=5).to(triton_device))
    assert seen == [3]


def test_where_a_gradient_may_be_wanted_the_modules_are_torchs(fused, triton_device):
    decoder = random_decoder("llama3_2").to(triton_device)
    fuse_torchtune(decoder)
    h = torch.randn(1, 4, 32, device=triton_device, requires_grad=True)
    decoder.layers[0](h).sum().backward()
    assert h.grad is not None
    assert not fused


def test_on_a_cpu_the_modules_are_torchs_to_the_bit():
    plain = tiny_backbone()
    model = qst_decoder(copy.deepcopy(plain), reduction_factor=4, base_quantization="none")
    model.side.disabled = True
    tokens = random_tokens(batch=2, length=7)
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
    assert not runs_fused(torch.zeros(1))


def test_copies_of_a_fused_module_are_independent_of_it(fused, triton_device):
    module = FeedForward(
        gate_proj=nn.Linear(4, 6), down_proj=nn.Linear(6, 4), up_proj=nn.Linear(4, 6)
    ).to(triton_device)
    fuse_torchtune(module)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    x = torch.randn(3, 4, device=triton_device)
    with torch.no_grad():
        expected = module(x)
        nn.init.zeros_(module.w1.weight)
        nn.init.zeros_(module.w1.bias)
        for one in copies:
            assert torch.equal(one(x), expected)
        assert not torch.equal(module(x), expected)
    assert fused["gated"] == 4


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.GELU(), None),
        (nn.ReLU(), None),
    ],
)
def test_an_activation_is_known_by_what_it_computes(activation, name):
    assert activation_name(activation) == name


def test_an_mlp_without_a_gate_or_with_another_activation_is_left_alone():
    linears = {"gate_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)}
    plain = FeedForward(**linears)
    other = FeedForward(**linears, up_proj=nn.Linear(4, 6), activation=nn.ReLU())
    for module in (plain, other):
        fuse_torchtune(module)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_kernels_pass_their_trial_in_any_mode_and_draw_no_numbers(mode, triton_device):
    state = torch.get_rng_state()
    with mode():
        assert fused_trial.find_fault(triton_device) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name", ["rms_norm", "rotate_pairs", "rotate_halves", "gated", "cross_entropy_"]
)
def test_a_kernel_with_other_values_does_not_pass(name, monkeypatch, triton_device, caplog):
    kernel = getattr(fused_trial, name)

    def wrong(first, *args, **kwargs):
        found = kernel(first, *args, **kwargs)
        return found.mul_(1.05)

    monkeypatch.setattr(fused_trial, name, wrong)
    assert not kernels.passes_trial(triton_device, fused_trial.find_fault)
    assert "has other values" in caplog.text


def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(fused_trial, "rms_norm", fail)
    assert not kernels.passes_trial("cpu", fused_trial.find_fault)
    assert "RuntimeError: no compiler" in caplog.text
