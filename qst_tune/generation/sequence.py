"""One sequence of tokens that a model goes on with, never running a token twice."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qst_tune.generation.caches import ModelCaches, without_head
from qst_tune.generation.sampling import Sampling
from qst_tune.training.precision import check_finite
from qst_tune.training.vocabulary import check_ids


class CachedSequence:
    """A model with the caches of the tokens it has run.

    Whatever is asked for, the longest common beginning with what was run before is taken from the
    caches: of a conversation only the new turn is run, and a text that was changed in the middle is
    run from there. Several sequences can be kept over one model.

    Args:
        model (Any): a ``QSTDecoder`` or ``PEQADecoder`` in evaluation mode. What it computes must
            not change meanwhile; in particular its side network stays on, or off.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens: list[int] = []
        self._caches = ModelCaches(model)

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Compute the logits of the token that follows.

        Args:
            tokens (Sequence[int]): the whole sequence, at least one.

        Returns:
            torch.Tensor: ``[V]``, fp32.

        Raises:
            ValueError: if there are more tokens than the model has positions.
            UserError: if the model has no row for a token, or a logit is not finite.
        """
        if len(tokens) > self.model.max_seq_len:
            raise ValueError(
                f"{len(tokens)} tokens are more than the model's max_seq_len "
                f"{self.model.max_seq_len}"
            )
        kept = min(_common_length(self.tokens, tokens), len(tokens) - 1)
        check_ids(self.model, [tokens[kept:]])
        kept = self._caches.cut(kept, len(tokens) - kept)
        # Not after the pass: it may be interrupted when some layers have their new keys.
        self.tokens = list(tokens[:kept])
        logits = self._run(tokens[kept:], start=kept)
        check_finite(logits, self.model, "logits")
        self.tokens = list(tokens)
        return logits

    def _run(self, new: Sequence[int], *, start: int) -> torch.Tensor:
        device = self.model.tok_embeddings.weight.device
        everywhere = torch.arange(start + len(new), device=device)
        positions = everywhere[start:]
        mask_TL = positions[:, None] >= everywhere
        with self._caches.attached(), without_head(self.model):
            head_input_BTD = self.model(
                torch.tensor([new], device=device), mask=mask_TL[None], input_pos=positions[None]
            )
        # Not [:, -1:]: with its strides torch copies the head's whole weight on a CPU.
        logits: torch.Tensor = self.model.output(head_input_BTD[:, -1]).float()
        return logits[0]


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def continue_sequence(
    sequence: CachedSequence,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
) -> Iterator[int]:
    """Generate tokens one by one, until a stop token, a number of them, or the end of the context.

    Args:
        sequence (CachedSequence): what was run before.
        prompt (Sequence[int]): at least one token.
        sampling (Sampling): how to choose.
        stop_tokens (Sequence[int]): the first of them ends the text and is not part of it.
        max_new_tokens (int): the most to generate.

    Yields:
        int: the next token.
    """
    tokens = list(prompt)
    longest = sequence.model.max_seq_len
    while len(tokens) <= longest and len(tokens) < len(prompt) + max_new_tokens:
        token = int(sampling.choose(sequence.next_logits(tokens)[None]))
        if token in stop_tokens:
            return
        yield token
        tokens.append(token)
