"""Architectures to train, with random weights: time and memory do not depend on their values."""

from dataclasses import asdict, dataclass

import torch
from torchtune import training
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

DTYPE = torch.bfloat16
SEED = 0


@dataclass(frozen=True)
class Backbone:
    """Sizes of a Llama with plain rotary embeddings and an untied head.

    torchtune's QLoRA can only store weights whose number of elements is a multiple of 64 x 256.

    Args:
        num_layers (int): layers.
        embed_dim (int): width.
        num_heads (int): query heads.
        num_kv_heads (int): key and value heads.
        intermediate_dim (int): width inside the MLP.
        vocab_size (int): tokens.
        max_seq_len (int): longest row.
    """

    num_layers: int = 24
    embed_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int = 4
    intermediate_dim: int = 2048
    vocab_size: int = 32_000
    max_seq_len: int = 4096

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.embed_dim // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Number of all weights."""
        attention = 2 * self.embed_dim * (self.embed_dim + self.num_kv_heads * self.head_dim)
        mlp = 3 * self.embed_dim * self.intermediate_dim
        norms = 2 * self.embed_dim
        ends = 2 * self.vocab_size * self.embed_dim + self.embed_dim
        return self.num_layers * (attention + mlp + norms) + ends

    def builder_arguments(self) -> dict[str, int | bool]:
        """Return the arguments that torchtune's ``llama3_2`` builders take.

        Returns:
            dict[str, int | bool]: sizes; plain rotary embeddings; an untied head.
        """
        return {**asdict(self), "scale_factor": 1, "tie_word_embeddings": False}


BACKBONES = {
    "200m": Backbone(),
    # Llama 3.2 1B with another vocabulary.
    "1b": Backbone(
        num_layers=16, embed_dim=2048, num_heads=32, num_kv_heads=8, intermediate_dim=8192
    ),
    "quick": Backbone(num_layers=4),
    "tiny": Backbone(
        num_layers=2,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=1,
        intermediate_dim=256,
        vocab_size=512,
        max_seq_len=128,
    ),
}


def dense_backbone(backbone: Backbone) -> TransformerDecoder:
    """Build it as torchtune does for full fine-tuning, in bf16; the weights are always the same.

    Args:
        backbone (Backbone): sizes.

    Returns:
        TransformerDecoder: all parameters trainable.
    """
    torch.manual_seed(SEED)
    with training.set_default_dtype(DTYPE):
        return llama3_2(**backbone.builder_arguments())
