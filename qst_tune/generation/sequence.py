"""One sequence of tokens that a model continues, never running a token twice."""

from collections.abc import Iterator, Sequence

import torch

from qst_tune.generation.caches import Decoder, ModelCaches, last_logits
from qst_tune.generation.sampling import Sampling
from qst_tune.modules.model_limits import check_ids


class CachedSequence:
    """A model with the caches of the tokens it has run.

    Every sequence takes its longest common beginning with the last one from the caches: of a
    conversation only the new turn is run. One model can have several of these. What it computes
    must not change meanwhile; in particular its side network stays on, or off.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.tokens: list[int] = []
        self._caches = ModelCaches(model)

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Compute the fp32 logits ``[V]`` of the token that follows a whole, non-empty sequence.

        More tokens than the model has positions are a ValueError; a token outside its vocabulary
        and a logit that is not finite are a UserError.
        """
        if len(tokens) > self.model.max_seq_len:
            raise ValueError(
                f"{len(tokens)} tokens are more than the model's max_seq_len "
                f"{self.model.max_seq_len}"
            )
        kept = min(_num_common(self.tokens, tokens), len(tokens) - 1)
        check_ids(self.model, [tokens[kept:]])
        kept = self._caches.cut(kept, len(tokens) - kept)
        # Not after the pass: it may be interrupted when some layers have their new keys.
        self.tokens = list(tokens[:kept])
        device = self.model.tok_embeddings.weight.device
        new_1N = torch.tensor([tokens[kept:]], device=device)
        is_real_1T = torch.ones(1, len(tokens), dtype=torch.bool, device=device)
        logits = last_logits(self.model, self._caches, new_1N, is_real_1T)[0]
        self.tokens = list(tokens)
        return logits


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
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
    """Generate tokens until a stop token, ``max_new_tokens`` or the end of the context."""
    tokens = list(prompt)
    longest = sequence.model.max_seq_len
    while len(tokens) <= longest and len(tokens) < len(prompt) + max_new_tokens:
        token = int(sampling.choose(sequence.next_logits(tokens)[None]))
        if token in stop_tokens:
            return
        yield token
        tokens.append(token)
