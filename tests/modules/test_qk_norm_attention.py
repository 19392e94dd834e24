"""The attention of Qwen3 against its equation, and against torchtune's without the norms."""

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import KVCache, MultiHeadAttention, RMSNorm

from qst_tune.modules.qk_norm_attention import QKNormAttention

DIM, HEADS, KV_HEADS, HEAD_DIM = 20, 4, 2, 6


def attention(kind=QKNormAttention, *, norms=True, kv_heads=KV_HEADS):
    torch.manual_seed(0)
    module = kind(
        embed_dim=DIM,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        q_proj=nn.Linear(DIM, HEADS * HEAD_DIM),
        k_proj=nn.Linear(DIM, kv_heads * HEAD_DIM),
        v_proj=nn.Linear(DIM, kv_heads * HEAD_DIM),
        output_proj=nn.Linear(HEADS * HEAD_DIM, DIM),
        pos_embeddings=Qwen2RotaryPositionalEmbeddings(HEAD_DIM, 16, 100.0),
        q_norm=RMSNorm(HEAD_DIM) if norms else None,
        k_norm=RMSNorm(HEAD_DIM) if norms else None,
        max_seq_len=16,
    )
    if norms:
        nn.init.uniform_(module.q_norm.scale, 0.2, 2)
        nn.init.uniform_(module.k_norm.scale, 0.2, 2)
    return module


def by_equation(module, x, allowed):
    """One head after the other, in plain operations."""
    heads = []
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        q = module.q_proj(x)[..., head * HEAD_DIM :][..., :HEAD_DIM]
        k = module.k_proj(x)[..., kv * HEAD_DIM :][..., :HEAD_DIM]
        v = module.v_proj(x)[..., kv * HEAD_DIM :][..., :HEAD_DIM]
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.q_norm.scale
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.k_norm.scale
        q, k = (module.pos_embeddings(part.unsqueeze(2)).squeeze(2) for part in (q, k))
        scores = (q @ k.transpose(1, 2) / HEAD_DIM**0.5).masked_fill(~allowed, -torch.inf)
        heads.append(F.softmax(scores, dim=-1) @ v)
    return module.output_proj(torch.cat(heads, dim=-1))


def test_output_is_that_of_the_equation() -> None:
    module, x = attention(), torch.randn(2, 7, DIM)
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 7, 7)
    expected = by_equation(module, x, causal)
    torch.testing.assert_close(module(x, x), expected)
    torch.testing.assert_close(module(x), expected)
    banded = causal & ~causal.tril(-3)
    torch.testing.assert_close(module(x, x, mask=banded), by_equation(module, x, banded))


def test_without_norms_it_is_torchtunes() -> None:
    for kv_heads in (HEADS, KV_HEADS):
        ours = attention(norms=False, kv_heads=kv_heads)
        theirs = attention(MultiHeadAttention, norms=False, kv_heads=kv_heads)
        x, positions = torch.randn(2, 7, DIM), torch.randint(16, (2, 7))
        torch.testing.assert_close(
            ours(x, x, input_pos=positions), theirs(x, x, input_pos=positions)
        )


@torch.no_grad()
def test_a_token_at_a_time_behind_a_cache_is_the_same() -> None:
    module, x = attention(), torch.randn(2, 7, DIM)
    expected = module(x, x)
    module.setup_cache(2, torch.float32, max_seq_len=8)
    assert isinstance(module.kv_cache, KVCache)
    for position in range(7):
        step = x[:, position : position + 1]
        mask = (torch.arange(8) <= position).expand(2, 1, 8)
        actual = module(step, step, mask=mask, input_pos=torch.tensor([position]))
        torch.testing.assert_close(actual, expected[:, position : position + 1])
