"""OPT (https://arxiv.org/abs/2205.01068), which torchtune 0.6.1 lacks.

Learned positions, LayerNorm, biases everywhere, a ReLU MLP without a gate, and a head tied to the
embedding. Sizes are those of the published ``config.json`` files.
"""

from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    TiedLinear,
    TransformerSelfAttentionLayer,
)

from qst_tune.modules.learned_positions import LearnedPositionDecoder, LearnedPositionEmbedding
from qst_tune.modules.post_norm_layer import PostNormLayer
from qst_tune.modules.projected_head import ProjectedHead


def opt(
    *,
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    intermediate_dim: int | None = None,
    token_dim: int | None = None,
    post_norm: bool = False,
    vocab_size: int = 50_272,
    max_seq_len: int = 2048,
) -> LearnedPositionDecoder:
    """Build an OPT decoder. It has no dropout: we train nothing of it.

    Args:
        num_layers (int): number of layers.
        num_heads (int): heads.
        embed_dim (int): D, width.
        intermediate_dim (int | None): width inside the MLP; None: 4 D, as in all published sizes.
        token_dim (int | None): width of the token embedding, ``word_embed_proj_dim``; None: D.
        post_norm (bool): norms behind the residual sums and none at the end, the opposite of
            ``do_layer_norm_before``.
        vocab_size (int): number of tokens.
        max_seq_len (int): number of positions.

    Returns:
        LearnedPositionDecoder: the decoder.
    """
    layers = [
        _layer(embed_dim, intermediate_dim or 4 * embed_dim, num_heads, max_seq_len, post_norm)
        for _ in range(num_layers)
    ]
    embedding = LearnedPositionEmbedding(vocab_size, embed_dim, max_seq_len, token_dim=token_dim)
    is_narrow = embedding.project_in is not None
    return LearnedPositionDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(layers),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=embed_dim // num_heads,
        norm=nn.Identity() if post_norm else nn.LayerNorm(embed_dim),
        output=ProjectedHead(embed_dim, embedding) if is_narrow else TiedLinear(embedding),
    )


def _layer(
    embed_dim: int, intermediate_dim: int, num_heads: int, max_seq_len: int, post_norm: bool
) -> TransformerSelfAttentionLayer:
    layer_type = PostNormLayer if post_norm else TransformerSelfAttentionLayer
    q_proj, k_proj, v_proj, output_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
    return layer_type(
        attn=MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=embed_dim // num_heads,
            q_proj=q_proj,
            k_proj=k_proj,
            v_proj=v_proj,
            output_proj=output_proj,
            max_seq_len=max_seq_len,
        ),
        mlp=FeedForward(
            gate_proj=nn.Linear(embed_dim, intermediate_dim),
            down_proj=nn.Linear(intermediate_dim, embed_dim),
            activation=nn.ReLU(),
        ),
        sa_norm=nn.LayerNorm(embed_dim),
        mlp_norm=nn.LayerNorm(embed_dim),
    )
