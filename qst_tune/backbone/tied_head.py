"""The LM head of a checkpoint whose head is its embedding: a file may have either, or both."""

import torch
from torchtune.modules import TiedLinear, TransformerDecoder

from qst_tune.errors import UserError

EMBEDDING = "tok_embeddings.weight"
HEAD = "output.weight"


class TiedHead:
    """Watches a checkpoint's weights for the two that must be one, if the model's head is tied.

    Both are views of memory-mapped files, so they are kept without being read.
    """

    def __init__(self, model: TransformerDecoder) -> None:
        self._is_tied = isinstance(model.output, TiedLinear)
        self._found: dict[str, torch.Tensor] = {}

    def is_head(self, name: str) -> bool:
        """Return whether the weight is a tied head, which is not a weight of the model."""
        return self._is_tied and name == HEAD

    def look_at(self, name: str, weight: torch.Tensor) -> None:
        """Keep a weight if it is one of the two."""
        if self._is_tied and name in (EMBEDDING, HEAD):
            self._found[name] = weight

    def head_without_embedding(self) -> torch.Tensor | None:
        """Return the head if the checkpoint has it in place of the embedding, once all are read.

        UserError if it has both, and they differ.
        """
        embedding, head = self._found.get(EMBEDDING), self._found.get(HEAD)
        if embedding is None or head is None:
            return head
        if not torch.equal(embedding, head):
            raise UserError(
                "config.json says that the LM head is the embedding (tie_word_embeddings), but the "
                "checkpoint has an lm_head.weight that differs from it: set tie_word_embeddings to "
                "false there if the head is meant, or take it out of the file"
            )
        return None
