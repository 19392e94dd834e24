"""Log-probabilities of texts after other texts, in batches that do not change them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from qst_tune.errors import UserError
from qst_tune.generation.caches import Decoder, without_head
from qst_tune.modules.model_limits import check_finite, check_ids
from qst_tune.training.task import Passes

# Rows of logits at once: 512 x 128,256 in fp32 are a quarter of a GiB.
_LOGITS_AT_ONCE = 512


@dataclass(frozen=True)
class Continuation:
    """A text and one that may follow it, of at least one token each."""

    context: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """Tokens that the model must read; one-token answers to a question share theirs."""
        return self.context + self.target[:-1]


@torch.no_grad()
def log_likelihood_passes(
    model: Decoder, continuations: Sequence[Continuation], *, batch_size: int, name: str = "scoring"
) -> Passes[list[float]]:
    r"""Compute :math:`\log p(\mathrm{target} \mid \mathrm{context})` of each, in nats.

    A pass is a batch. Sequences are padded on the right, where causal attention ignores padding,
    and one that several continuations share is run once. The LM head runs only on the positions of
    the targets. UserError if one is longer than the model's context, a token is outside its
    vocabulary, or a logit is not finite.
    """
    by_row: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(continuations):
        by_row.setdefault(continuation.row, []).append(number)
    rows = sorted(by_row, key=len, reverse=True)  # little padding, and the largest batch first
    _check_length(rows, model.max_seq_len)
    check_ids(model, (c.context + c.target for c in continuations))
    found = [0.0] * len(continuations)
    for start in tqdm(range(0, len(rows), batch_size), desc=name):
        yield
        batch = rows[start : start + batch_size]
        hidden_BTD = _head_inputs(model, batch)
        for row, hidden_TD in zip(batch, hidden_BTD, strict=True):
            for number in by_row[row]:
                target = continuations[number].target
                places = hidden_TD[len(row) - len(target) : len(row)]
                found[number] = _log_probability(model, places, target)
    check_finite(torch.tensor(found), model, "log probabilities")
    return found


def _check_length(rows: Sequence[Sequence[int]], max_seq_len: int) -> None:
    if rows and len(rows[0]) > max_seq_len:
        raise UserError(
            f"a text of {len(rows[0])} tokens is longer than the model's max_seq_len {max_seq_len}"
        )


def _head_inputs(model: Decoder, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """``[B, T, D]``; meaningless after the end of a sequence."""
    device = model.tok_embeddings.weight.device
    longest = max(map(len, rows))
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    with without_head(model):
        hidden: torch.Tensor = model(torch.tensor(padded, device=device))
    return hidden


def _log_probability(model: Decoder, places: torch.Tensor, target: Sequence[int]) -> float:
    """Sum over the target's tokens; ``places`` is ``[len(target), D]``."""
    labels = torch.tensor(target, device=places.device)
    total = 0.0
    for part, part_labels in zip(
        places.split(_LOGITS_AT_ONCE), labels.split(_LOGITS_AT_ONCE), strict=True
    ):
        logits = model.output(part[None])[0].float()
        losses = F.cross_entropy(logits, part_labels, reduction="none")
        total -= losses.double().sum().item()
    return total
