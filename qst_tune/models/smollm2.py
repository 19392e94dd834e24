"""SmolLM2 (https://arxiv.org/abs/2502.02737): the Llama architecture with plain rotary embeddings.

torchtune 0.6.1 has no builder for it. Sizes are those of the published ``config.json`` files.
"""

from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from qst_tune.models.peqa import peqa_builder
from qst_tune.models.qst import qst_builder


def smollm2(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    rope_base: int,
) -> TransformerDecoder:
    """Build a SmolLM2 decoder: context 8192, vocabulary 49152, tied embeddings."""
    return llama3_2(
        vocab_size=49_152,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=8192,
        rope_base=rope_base,
        norm_eps=1e-5,
        scale_factor=1,  # plain rotary embeddings; llama3_2's default 32 is silently wrong here
        tie_word_embeddings=True,
    )


def smollm2_135m() -> TransformerDecoder:
    """Build SmolLM2-135M, 134,515,008 parameters."""
    return smollm2(
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        intermediate_dim=1536,
        rope_base=100_000,
    )


def smollm2_360m() -> TransformerDecoder:
    """Build SmolLM2-360M, 361,821,120 parameters."""
    return smollm2(
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        embed_dim=960,
        intermediate_dim=2560,
        rope_base=100_000,
    )


def smollm2_1_7b() -> TransformerDecoder:
    """Build SmolLM2-1.7B, 1,711,376,384 parameters."""
    return smollm2(
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        embed_dim=2048,
        intermediate_dim=8192,
        rope_base=130_000,
    )


qst_smollm2_135m = qst_builder(smollm2_135m)
qst_smollm2_360m = qst_builder(smollm2_360m)
qst_smollm2_1_7b = qst_builder(smollm2_1_7b)
peqa_smollm2_135m = peqa_builder(smollm2_135m)
peqa_smollm2_360m = peqa_builder(smollm2_360m)
peqa_smollm2_1_7b = peqa_builder(smollm2_1_7b)
