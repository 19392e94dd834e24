"""Answers to several prompts at once, padded on the left; each is the answer it gets alone."""

from collections.abc import Iterator, Sequence

import torch

from qst_tune.generation.caches import Decoder, ModelCaches, last_logits
from qst_tune.generation.sampling import Sampling
from qst_tune.modules.model_limits import check_ids


def answer_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Generate an answer for each prompt, of token ids and of at most ``max_new_tokens``.

    The first stop token ends an answer and is not part of it. The model is in evaluation mode, and
    has positions for the longest prompt and ``max_new_tokens``.
    """
    check_ids(model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    # Complete answers run on, unread, until the last one is complete.
    for tokens in _choices(model, prompts, sampling, max_new_tokens):
        running -= {row for row in running if tokens[row] in stop_tokens}
        for row in running:
            answers[row].append(tokens[row])
        if not running:
            break
    return answers


@torch.no_grad()
def _choices(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, count: int
) -> Iterator[list[int]]:
    """Choose the next token of every prompt, ``count`` times."""
    device = model.tok_embeddings.weight.device
    tokens_BT, is_real_BT = _left_padded(prompts, device)
    caches = ModelCaches(model)
    new_BN = tokens_BT
    for _ in range(count):
        next_B = sampling.choose(last_logits(model, caches, new_BN, is_real_BT))
        yield next_B.tolist()
        new_BN = next_B[:, None]
        is_real_BT = torch.cat([is_real_BT, torch.ones_like(new_BN, dtype=torch.bool)], dim=1)


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[B, T]``, and which of them are not padding."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    start_B1 = torch.tensor(padding, device=device)[:, None]
    return torch.tensor(ids, device=device), torch.arange(longest, device=device) >= start_B1
