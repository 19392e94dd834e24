"""The LM head of a checkpoint whose head is its embedding: a file may hold either, or both."""

import torch
from torchtune.modules import TiedLinear, TransformerDecoder

from qst_tune.errors import UserError

EMBEDDING = "tok_embeddings.weight"
HEAD = "output.weight"


class TiedHead:
    """Watches the weights of a checkpoint for the two that must be one.

    Both are views of memory-mapped files, so they are held without being read.

    Args:
        model (TransformerDecoder): may be on meta. Nothing is watched where it has a head of its
            own.
    """

    def __init__(self, model: TransformerDecoder) -> None:
        self._is_tied = isinstance(model.output, TiedLinear)
        self._found: dict[str, torch.Tensor] = {}

    def is_head(self, name: str) -> bool:
        """Tell whether a weight is a head that the model has not.

        Args:
            name (str): torchtune's.

        Returns:
            bool: True for one that is tied.
        """
        return self._is_tied and name == HEAD

    def look_at(self, name: str, weight: torch.Tensor) -> None:
        """Keep a weight if it is one of the two.

        Args:
            name (str): torchtune's.
            weight (torch.Tensor): of the checkpoint.
        """
        if self._is_tied and name in (EMBEDDING, HEAD):
            self._found[name] = weight

    def head_without_embedding(self) -> torch.Tensor | None:
        """Compare the two, when all weights were looked at.

        Returns:
            torch.Tensor | None: the head, if the checkpoint has it in the embedding's place.

        Raises:
            UserError: if it has both, and they differ.
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
