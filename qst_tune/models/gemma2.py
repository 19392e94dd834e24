"""Gemma 2 with its logits capped where the model has them capped."""

from torchtune.models import gemma2 as torchtune_gemma2
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import TransformerDecoder

from qst_tune.modules.soft_capped_head import SoftCappedHead


def gemma2(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    norm_eps: float = 1e-6,
    rope_base: float = 10_000.0,
    query_pre_attn_scalar: float = 256,
    attention_cap: float | None = 50.0,
    logit_cap: float | None = 30.0,
) -> TransformerDecoder:
    """Build torchtune's Gemma 2, with two differences.

    torchtune 0.6.1 caps the input of the LM head (``Gemma2FinalNorm``); here the logits are capped,
    as in transformers and the paper. And no layer has a sliding window: torchtune's counts from the
    first key, which is wrong behind a key-value cache, so ``max_seq_len`` must not exceed it.

    Args:
        vocab_size (int): V.
        num_layers (int): number of layers.
        num_heads (int): query heads.
        num_kv_heads (int): key and value heads.
        head_dim (int): width of a head.
        embed_dim (int): D, width.
        intermediate_dim (int): width inside the MLP.
        max_seq_len (int): at most the model's sliding window, 4096 in all published sizes.
        norm_eps (float): epsilon of all norms.
        rope_base (float): of the rotary embedding.
        query_pre_attn_scalar (float): queries are divided by its square root.
        attention_cap (float | None): soft cap of the attention scores; None for none.
        logit_cap (float | None): soft cap of the logits; None for none.

    Returns:
        TransformerDecoder: the decoder, its head tied to the embedding.
    """
    decoder = torchtune_gemma2.gemma2(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        norm_eps=norm_eps,
        rope_base=rope_base,
        hidden_capping_value=attention_cap,
        sliding_window_size=None,
        query_pre_attn_scalar=query_pre_attn_scalar,
    )
    decoder.norm = GemmaRMSNorm(embed_dim, eps=norm_eps)
    if logit_cap is not None:
        decoder.output = SoftCappedHead(decoder.tok_embeddings, logit_cap)
    return decoder
