"""Tiny backbones and the translation of our parameters to the names of tests/reference."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import training
from torchtune.models import convert_weights
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_2 import llama3_2

from qst_tune.modules.side.downsample import LinearDownsample, PoolDownsample
from qst_tune.modules.side.output_mix import AlphaMix, ResidualMix, SigmoidMix
from qst_tune.quantization.nf4 import nf4_block_sizes
from tests.reference import qst_reference as reference

# Odd on purpose: 61 is prime, 3 kv heads for 6, and 100 / 4 = 25 wide inside the side MLP.
TINY = {
    "vocab_size": 61,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 3,
    "embed_dim": 96,
    "max_seq_len": 64,
    "intermediate_dim": 100,
}
TINY_REDUCTION = 4  # side width 24, 6 heads of 4, 3 kv heads


def tiny_backbone(*, dtype=torch.float32, tied=False, **sizes):
    """A Llama with random weights; norms too, so that a forgotten one shows."""
    sizes = {**TINY, **sizes}
    with training.set_default_dtype(dtype):
        plain_rope = {"scale_factor": 1, "rope_base": 10_000}
        backbone = llama3_2(**sizes, **plain_rope) if tied else llama2(**sizes)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("norm.scale"):
                parameter.uniform_(0.5, 1.5)
    return backbone


def randomize_(module: nn.Module) -> None:
    """Draw every parameter anew, so that nothing stays at 0, 1 or another special value."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.2, 1.2)
            else:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)


def random_tokens(batch=2, length=11, vocab_size=TINY["vocab_size"]):
    return torch.randint(1, vocab_size, (batch, length))


def padded_batch(
    side: str, lengths: tuple[int, ...], *, pad_id: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids above the padding's and a mask of rows of these lengths, padded on one side."""
    width = max(lengths)
    tokens = torch.randint(pad_id + 1, vocab_size, (len(lengths), width))
    index = torch.arange(width).expand(len(lengths), width)
    length = torch.tensor(lengths)[:, None]
    real = index < length if side == "right" else index >= width - length
    return tokens.masked_fill(~real, pad_id), real


def losses_of_steps(
    loss: Callable[[], torch.Tensor],
    parameters: Iterable[torch.Tensor],
    *,
    lr: float,
    num_steps: int = 3,
) -> list[float]:
    """The loss before each of so many steps of AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for _ in range(num_steps):
        value = loss()
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return losses


def decoded_by_torchao(weight):
    """What torchao makes of a weight that is quantised to NF4 and back."""
    return to_nf4(weight, *nf4_block_sizes(weight.numel())).get_original_weight()


def dense_weight(weight):
    """A weight as torchao, not we, would decode it."""
    return weight.get_original_weight() if isinstance(weight, NF4Tensor) else weight.detach()


def reference_backbone(model, dtype=torch.float32) -> reference.Weights:
    """The backbone's weights under Hugging Face names, decoded if they are NF4."""
    state = {
        name: dense_weight(parameter).to(dtype)
        for name, parameter in model.named_parameters()
        if not name.startswith("side.")
    }
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    attn = model.layers[0].attn
    return convert_weights.tune_to_hf(
        state, num_heads=attn.num_heads, num_kv_heads=attn.num_kv_heads, dim=attn.embed_dim
    )


def reference_side(side, state) -> reference.Weights:
    """``state`` (the parameters of ``side``) under the reference's names; differentiable."""
    attn = side.blocks[0].attn
    blocks = {
        name.replace("blocks.", "layers.", 1): value
        for name, value in state.items()
        if name.startswith("blocks.")
    }
    converted = convert_weights.tune_to_hf(
        blocks, num_heads=attn.num_heads, num_kv_heads=attn.num_kv_heads, dim=attn.embed_dim
    )
    weights = {
        name.replace("model.layers.", "model.qst_layers."): value
        for name, value in converted.items()
    }
    others = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    weights.update((_reference_name(name), value) for name, value in others.items())
    return weights


def reference_choices(model) -> reference.Choices:
    """What the built modules are, found by their types."""
    side, mixes = model.side, {"residual": ResidualMix, "alpha": AlphaMix, "sigmoid": SigmoidMix}
    down = side.downsample[0]
    activation, kind = nn.SiLU, "adapter"
    if isinstance(down, PoolDownsample):
        kind = down.kind
    elif isinstance(down, LinearDownsample):
        kind = "linear"
    else:
        activation = type(down.activation)
    names = {nn.SiLU: "silu", nn.ReLU: "relu", nn.GELU: "gelu", nn.Identity: "identity"}
    return reference.Choices(
        downsample=kind,
        activation=names[activation],
        shared_first=len(side.downsample) == len(side.blocks),
        normalize_hidden=side.config.normalize_hidden,
        output_mix=next(n for n, kind in mixes.items() if type(side.output_mix) is kind),
    )


def reference_shape(blocks) -> reference.Shape:
    layer = blocks[0]
    return reference.Shape(
        num_layers=len(blocks),
        num_heads=layer.attn.num_heads,
        num_kv_heads=layer.attn.num_kv_heads,
        rope_base=layer.attn.pos_embeddings.base,
        norm_eps=layer.sa_norm.eps,
    )


def _reference_name(name: str) -> str:
    group, _, rest = name.partition(".")
    if group == "gates":
        return f"model.z.{rest.removesuffix('.gamma')}"
    if group == "downsample":
        index, _, part = rest.partition(".")
        owner, dot, leaf = part.partition(".")
        owner = {
            "reduce": "adapter_A",
            "expand": "adapter_B",
            "norm": "post_layer_norm",
        }.get(owner, owner)
        return f"model.downsample.{index}.{owner}{dot}{leaf}"
    return {
        "norm.scale": "model.norm_qst.weight",
        "output_mix.alpha": "lm_head_z",
        "output_mix.logit": "lm_head_z",
    }.get(name, name)
