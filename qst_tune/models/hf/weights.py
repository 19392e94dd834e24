"""Weights under Hugging Face's names and under torchtune's."""

import re
from dataclasses import dataclass

import torch

from qst_tune.errors import UserError

Weights = dict[str, torch.Tensor]

_LAYER = re.compile(r"\.(\d+)\.")

# Hugging Face's name of a module -> torchtune's; ``{}`` stands for the number of a layer.
LLAMA_MODULES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers.{}.self_attn.q_proj": "layers.{}.attn.q_proj",
    "model.layers.{}.self_attn.k_proj": "layers.{}.attn.k_proj",
    "model.layers.{}.self_attn.v_proj": "layers.{}.attn.v_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attn.output_proj",
    "model.layers.{}.self_attn.q_norm": "layers.{}.attn.q_norm",
    "model.layers.{}.self_attn.k_norm": "layers.{}.attn.k_norm",
    "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.w1",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.w2",
    "model.layers.{}.mlp.up_proj": "layers.{}.mlp.w3",
    "model.layers.{}.input_layernorm": "layers.{}.sa_norm",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
}
# torchtune 0.6.1 has the last two the other way round (gemma2/_convert_weights.py:32).
GEMMA2_MODULES = {
    **LLAMA_MODULES,
    "model.layers.{}.post_attention_layernorm": "layers.{}.sa_scale",
    "model.layers.{}.pre_feedforward_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_scale",
}


@dataclass(frozen=True)
class WeightConversion:
    """How one model's weights are renamed, split and permuted.

    Args:
        num_heads (int): query heads.
        num_kv_heads (int): key and value heads.
        head_dim (int): width of a head.
        turns_neighbours (bool): rows of q and k become those of a rotary embedding that turns
            neighbouring channels, instead of ones half a head apart.
        modules (dict[str, str]): names of modules.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    turns_neighbours: bool
    modules: dict[str, str]

    def __call__(self, weights: Weights) -> Weights:
        """Convert any subset of a model's weights.

        Args:
            weights (Weights): under Hugging Face's names.

        Returns:
            Weights: the same under torchtune's; views where rows are split, copies where permuted.

        Raises:
            UserError: if a name is not one of this model, or a fused weight has other sizes.
        """
        converted: Weights = {}
        for name, weight in weights.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            for part, rows in self._split(name, weight).items():
                converted[self._rename(part)] = self._permute(part, rows)
        return converted

    def _split(self, name: str, weight: torch.Tensor) -> Weights:
        """Phi-3 has q, k and v in one weight, and gate and up."""
        query, value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for fused, parts in (
            ("qkv_proj", {"q_proj": query, "k_proj": value, "v_proj": value}),
            ("gate_up_proj", {"gate_proj": len(weight) // 2, "up_proj": len(weight) // 2}),
        ):
            if f".{fused}." in name:
                self._check_rows(name, weight, sum(parts.values()))
                pieces = weight.split(list(parts.values()))
                names = [name.replace(fused, part) for part in parts]
                return dict(zip(names, pieces, strict=True))
        return {name: weight}

    def _rename(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        number = _LAYER.search(name)
        ours = self.modules.get(_LAYER.sub(".{}.", module, count=1))
        if ours is None or leaf not in ("weight", "bias"):
            raise UserError(f"it has a weight {name}, which this architecture has not")
        is_norm = ours.endswith(("norm", "_scale"))
        leaf = "scale" if is_norm and leaf == "weight" else leaf
        return f"{ours.format(number[1] if number else '')}.{leaf}"

    def _permute(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        is_query, is_key = ".q_proj." in name, ".k_proj." in name
        if not self.turns_neighbours or not (is_query or is_key):
            return weight
        heads = self.num_heads if is_query else self.num_kv_heads
        self._check_rows(name, weight, heads * self.head_dim)
        halves = weight.view(heads, 2, self.head_dim // 2, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)

    def _check_rows(self, name: str, weight: torch.Tensor, rows: int) -> None:
        if len(weight) != rows:
            raise UserError(
                f"{name} has {len(weight)} rows, and {rows} by the head counts of config.json"
            )
