"""Attention that normalises queries and keys before it turns them, as Qwen3 does."""

import torch
from torch import nn
from torchtune.modules import MultiHeadAttention
from torchtune.modules.attention_utils import _MaskType


class QKNormAttention(MultiHeadAttention):
    r"""torchtune's attention with ``q_norm`` and ``k_norm`` before the rotary embedding.

    .. math:: q_h = R_p\,\mathrm{norm}_q(W_q x)_h, \qquad k_h = R_p\,\mathrm{norm}_k(W_k x)_h

    for each head h, where :math:`R_p` turns by position p. torchtune 0.6.1 norms after the turn
    (attention.py:247), which its weights do not commute with. Takes the arguments of
    ``MultiHeadAttention``.

    Source: Qwen3 (https://arxiv.org/abs/2505.09388) as in transformers' ``modeling_qwen3.py``.
    """

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        *,
        mask: _MaskType | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; arguments and result as in torchtune's ``MultiHeadAttention``.

        Args:
            x (torch.Tensor): ``[B, T, D]``, makes the queries.
            y (torch.Tensor | None): ``[B, T, D]``, makes keys and values; None: x.
            mask (_MaskType | None): ``[B, T, S]`` booleans, True where a row may attend; default
                causal.
            input_pos (torch.Tensor | None): positions, ``[B, T]`` or ``[T]``; None: the index.

        Returns:
            torch.Tensor: ``[B, T, D]``.
        """
        source = x if y is None else y
        q = self._turned(self.q_proj(x), self.q_norm, input_pos)
        k = self._turned(self.k_proj(source), self.k_norm, input_pos)
        v = self._heads(self.v_proj(source)).transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        repeats = self.num_heads // self.num_kv_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        attended = self._attention_call(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.kv_cache is None and mask is None and self.is_causal,
        )
        output: torch.Tensor = self.output_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _turned(
        self, projected: torch.Tensor, norm: nn.Module | None, input_pos: torch.Tensor | None
    ) -> torch.Tensor:
        """``[B, H, T, K]`` queries or keys."""
        heads = self._heads(projected)
        heads = heads if norm is None else norm(heads)
        if self.pos_embeddings is not None:
            heads = self.pos_embeddings(heads, input_pos=input_pos)
        return heads.transpose(1, 2)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """``[B, T, H, K]``."""
        heads: torch.Tensor = projected.unflatten(-1, (-1, self.head_dim))
        return heads
