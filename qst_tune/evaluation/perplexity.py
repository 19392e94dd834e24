"""How well a model predicts a text."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.errors import UserError, first_line
from qst_tune.evaluation.log_likelihood import Continuation, log_likelihood_passes
from qst_tune.generation.caches import Decoder
from qst_tune.training.task import Passes

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class TextScore:
    """A model's score on a text."""

    nats: float  # negative log-likelihood of all predicted tokens
    num_tokens: int  # predicted tokens
    num_bytes: int  # of the whole text, UTF-8

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss of a token; depends on the tokenizer."""
        loss = self.nats / self.num_tokens
        return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, comparable between models with different tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


def text_windows(tokens: list[int], window: int) -> list[Continuation]:
    """Cut a text so that every token except the first is predicted once.

    The next window of ``window`` tokens begins with the last token that this one predicts, and has
    no context before it.
    """
    return [
        Continuation((tokens[start],), tuple(tokens[start + 1 : start + window + 1]))
        for start in range(0, len(tokens) - 1, window)
    ]


def read_text(
    path: Path, tokenizer: ModelTokenizer, max_tokens: int | None = None
) -> tuple[list[int], int]:
    """Return the tokens of a UTF-8 file, at most ``max_tokens``, and the bytes that they stand for.

    A file that cannot be read or has fewer than two tokens is a UserError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"text={path} cannot be read: {first_line(error)}") from error
    tokens: list[int] = tokenizer.encode(text, add_bos=True, add_eos=False)
    if max_tokens is not None and max_tokens < len(tokens):
        tokens = tokens[:max_tokens]
        text = tokenizer.decode(tokens)
    if len(tokens) < 2:
        raise UserError(f"text={path} is too short: it has {len(tokens)} tokens")
    return tokens, len(text.encode())


def text_passes(
    model: Decoder, tokens: list[int], num_bytes: int, *, window: int, batch_size: int
) -> Passes[TextScore]:
    """Score the tokens of :func:`read_text`, ``batch_size`` windows a pass."""
    windows = text_windows(tokens, window)
    passes = log_likelihood_passes(model, windows, batch_size=batch_size, name="text")
    found = yield from passes
    return TextScore(-sum(found), len(tokens) - 1, num_bytes)
