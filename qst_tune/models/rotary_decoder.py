"""One builder for Llama and the families that differ from it in a bias, a norm or a rotary base."""

from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from qst_tune.modules.qk_norm_attention import QKNormAttention


def rotary_decoder(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    norm_eps: float,
    rope: nn.Module,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    tie_word_embeddings: bool = False,
) -> TransformerDecoder:
    """Build a decoder of Llama's shape: RMS norms before attention and a gated SiLU MLP.

    torchtune 0.6.1 has a builder for each of these families, but none with an explicit head_dim,
    biases and a choice of the rotary embedding; beyond that the modules and their names are theirs.

    Args:
        vocab_size (int): V.
        num_layers (int): number of layers.
        num_heads (int): H, query heads.
        num_kv_heads (int): key and value heads.
        head_dim (int): width of a head; H of them need not be as wide as the model.
        embed_dim (int): D, width.
        intermediate_dim (int): width inside the MLP.
        max_seq_len (int): positions of the rotary embedding.
        norm_eps (float): epsilon of all norms.
        rope (nn.Module): rotary embedding over ``head_dim`` channels, shared by the layers.
        qkv_bias (bool): biases of the projections to queries, keys and values.
        output_bias (bool): bias of the projection behind attention.
        mlp_bias (bool): biases in the MLP.
        qk_norm (bool): RMS norm of each query and key head, before it turns (Qwen3).
        tie_word_embeddings (bool): the LM head is the embedding.

    Returns:
        TransformerDecoder: the decoder.
    """

    def attention() -> MultiHeadAttention:
        attention_type = QKNormAttention if qk_norm else MultiHeadAttention
        kv_dim = num_kv_heads * head_dim
        return attention_type(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=nn.Linear(embed_dim, num_heads * head_dim, bias=qkv_bias),
            k_proj=nn.Linear(embed_dim, kv_dim, bias=qkv_bias),
            v_proj=nn.Linear(embed_dim, kv_dim, bias=qkv_bias),
            output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=output_bias),
            pos_embeddings=rope,
            q_norm=RMSNorm(head_dim, eps=norm_eps) if qk_norm else None,
            k_norm=RMSNorm(head_dim, eps=norm_eps) if qk_norm else None,
            max_seq_len=max_seq_len,
        )

    def layer() -> TransformerSelfAttentionLayer:
        return TransformerSelfAttentionLayer(
            attn=attention(),
            mlp=FeedForward(
                gate_proj=nn.Linear(embed_dim, intermediate_dim, bias=mlp_bias),
                down_proj=nn.Linear(intermediate_dim, embed_dim, bias=mlp_bias),
                up_proj=nn.Linear(embed_dim, intermediate_dim, bias=mlp_bias),
            ),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )

    embedding = nn.Embedding(vocab_size, embed_dim)
    tied = tie_word_embeddings
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(layer() for _ in range(num_layers)),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embedding) if tied else nn.Linear(embed_dim, vocab_size, bias=False),
    )
