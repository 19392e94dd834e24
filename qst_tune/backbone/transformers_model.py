"""What the models of both methods over a decoder of transformers share."""

from typing import Any

from torch import nn

from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.modules.backbone import Head


class TransformersModel(nn.Module):
    """torchtune's names for the parts of a decoder of transformers.

    The decoder's parameters are under ``frozen.model.`` and transformers' names.
    """

    num_output_chunks: int
    takes_padding = True

    @property
    def backbone(self) -> TransformersBackbone:
        """The decoder."""
        frozen: Any = self.frozen
        backbone: TransformersBackbone = frozen
        return backbone

    @property
    def max_seq_len(self) -> int:
        """The backbone's."""
        return self.backbone.max_seq_len

    @property
    def output(self) -> Head:
        """The LM head, with the model's own soft cap and scale."""
        return self.backbone.head

    @property
    def tok_embeddings(self) -> Any:
        """The token embedding."""
        return self.backbone.embedding

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers."""
        return self.backbone.layers

    def caches_are_enabled(self) -> bool:
        """Whether keys and values are cached, so that a pass depends on those before it."""
        return self.backbone.cache is not None

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Return logits in this number of chunks along the tokens, for torchtune's chunked loss."""
        self.num_output_chunks = num_output_chunks
