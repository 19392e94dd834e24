"""Tiny models with side networks, and what several tests measure of them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from qst_tune.models import qst_decoder
from qst_tune.modules.side.block import SideShape
from qst_tune.modules.side.config import SideConfig
from qst_tune.modules.side.network import SideNetwork
from tests.support.numbers import (
    TINY_REDUCTION,
    randomize_,
    tiny_backbone,
)

# fp32 sums in another order: 1.05e-5 at most, over 8 seeds and every tensor of every variant.
FP32 = {"rtol": 1e-5, "atol": 2e-5}


def tiny_model(*, dtype=torch.float32, tied=False, random=True, sizes=None, **side_arguments):
    fixed = {"reduction_factor": TINY_REDUCTION, "downsample": "adapter", "rank": 5}
    arguments = {**fixed, **side_arguments}
    model = qst_decoder(tiny_backbone(dtype=dtype, tied=tied, **(sizes or {})), **arguments)
    if random:
        randomize_(model.side)
    return model


def next_token_loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def our_gradients(model, tokens):
    next_token_loss(model(tokens), tokens).backward()
    return {name: p.grad for name, p in model.side.named_parameters()}


def kept_bytes(run):
    """Bytes that autograd keeps for backward while ``run`` builds a graph."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


class ToyBlock(nn.Module):
    """Mixes channels and, causally, tokens; smooth, and float64 throughout."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, *, mask=None, input_pos=None):
        return x + torch.tanh(self.linear(x.cumsum(1)))


class ToyBackbone:
    """What a side network is built from, with toy blocks."""

    def __init__(self, width, num_layers, dim):
        self.width, self.num_layers, self.dim = width, num_layers, dim

    def side_shape(self, reduction_factor, min_head_dim):
        return SideShape(self.dim, self.dim, 1, 1)

    def side_blocks(self, layers, shape):
        return nn.ModuleList(ToyBlock(shape.embed_dim) for _ in layers)

    def side_norm(self, dim):
        return nn.LayerNorm(dim)


def toy_side(num_layers=2, num_downsamplers=None, in_dim=6, dim=3, gamma_channels=1):
    config = SideConfig(
        variant="paper",
        rank=2,
        downsample_norm=True,
        initial_gamma=0.3,
        gate_per_channel=gamma_channels > 1,
        share_first_downsample=num_downsamplers == num_layers,
    )
    return SideNetwork(ToyBackbone(in_dim, num_layers, dim), config.resolved(in_dim, num_layers))


def side_of(variant="default", **arguments):
    model = qst_decoder(tiny_backbone(), reduction_factor=4, variant=variant, **arguments)
    return model.side


def assert_documented_initial_values(side, variant):
    uniform = []
    for name, parameter in side.named_parameters():
        value = parameter.detach()
        if name.startswith("gates"):
            expected = 0.5 if variant == "authors" else 0.0
        elif name.startswith("output_mix") or name.endswith(("norm.scale", "norm.weight")):
            expected = 1.0
        elif name.endswith("norm.bias") or (variant == "default" and name.startswith("upsample")):
            expected = 0.0
        else:
            assert name.endswith("weight") or name == "upsample.bias", name
            fan_in = side.upsample.in_features if name == "upsample.bias" else value.shape[1]
            uniform.append((value * fan_in**0.5).flatten())  # nn.Linear: U(+-1/sqrt(fan_in))
            continue
        assert torch.equal(value, torch.full_like(value, expected)), name
    values = torch.cat(uniform)
    assert values.abs().max() <= 1 + 1e-6
    # Of n uniform values the largest gap in the empirical distribution is below 1.95 / sqrt(n)
    # with probability 0.999 (Kolmogorov); the seed is fixed.
    ordered = (values.sort().values + 1) / 2
    uniform_cdf = torch.linspace(0, 1, len(ordered))
    assert (ordered - uniform_cdf).abs().max() < 1.95 / len(ordered) ** 0.5
    assert len(values) > 10_000


def packed_mask(documents: torch.Tensor):
    """As torchtune makes it on CUDA: causal within each sample of a pack."""

    def within(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    batch, length = documents.shape
    return create_block_mask(within, batch, None, length, length, device="cpu")
