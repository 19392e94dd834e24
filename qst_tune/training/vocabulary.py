"""Token ids that a model has rows for, in its embedding and in its LM head.

A tokenizer may know more tokens than the model: one was added to it without resizing the embedding,
or it is another model's. An index outside an embedding is a traceback on a CPU, and on a GPU an
assertion that ends the process.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TransformerDecoder

from qst_tune.errors import UserError

# Fields of a row that hold one sequence's tokens, with those that hold its labels.
SEQUENCES = (
    ("tokens", "labels"),
    ("chosen_input_ids", "chosen_labels"),
    ("rejected_input_ids", "rejected_labels"),
)


@dataclass(frozen=True)
class Vocabulary:
    """The ids that may occur in a row: below ``size``; as labels, below ``num_logits``."""

    size: int
    num_logits: int
    tokenizer: Any
    ignore_index: int = CROSS_ENTROPY_IGNORE_IDX

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding id, or 0 where the embedding has no row for it.

        Any row does: padding is neither seen by a token of the text nor learnt.
        """
        pad_id = getattr(self.tokenizer, "pad_id", None)
        return pad_id if isinstance(pad_id, int) and 0 <= pad_id < self.size else 0

    def problem(self, row: dict[str, Any]) -> str | None:
        """Name the first id of a row or a pack that the model has no row for; None without any."""
        for tokens, labels in SEQUENCES:
            for outside in _outside(row.get(tokens), self.size, None):
                return f"token {self._named(outside)} {self._sizes('embedding', self.size)}"
            for outside in _outside(row.get(labels), self.num_logits, self.ignore_index):
                return f"label {self._named(outside)} {self._sizes('LM head', self.num_logits)}"
        return None

    def _named(self, token: int) -> str:
        try:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
        except Exception:  # any tokenizer may be here; only some take the argument, or the id
            return str(token)
        return f"{text!r} ({token})" if text else str(token)

    def _sizes(self, table: str, size: int) -> str:
        known = getattr(self.tokenizer, "vocab_size", None)
        tokenizer = f"the tokenizer has {known} tokens, " if isinstance(known, int) else ""
        return (
            f"is outside the model: {tokenizer}the {table} {size} rows: use the model's own "
            "tokenizer, or add the token to the model before tuning it (resize_token_embeddings)"
        )


def _outside(ids: Any, limit: int, ignored: int | None) -> Iterator[int]:
    """Ids that are no number of a row; none where ``ids`` is a class, or absent."""
    if hasattr(ids, "__len__"):
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        yield from (i for i in values if not 0 <= i < limit and i != ignored)


def vocabulary_of(
    model: TransformerDecoder, tokenizer: Any, ignore_index: int = CROSS_ENTROPY_IGNORE_IDX
) -> Vocabulary:
    """Return the ids that a model has rows for; it may be on meta."""
    size = model.tok_embeddings.num_embeddings
    # A head that is tied, whatever is around it, has the embedding's rows.
    num_logits = getattr(model.output, "out_features", size)
    return Vocabulary(size, num_logits, tokenizer, ignore_index)


def check_ids(model: TransformerDecoder, texts: Iterable[Sequence[int]]) -> None:
    """Refuse texts with a token that the model has no row for, before it runs on them."""
    size = model.tok_embeddings.num_embeddings
    for text in texts:
        if text and not 0 <= min(text) <= max(text) < size:
            outside = next(token for token in text if not 0 <= token < size)
            raise UserError(
                f"token {outside} of the text is outside the model, whose embedding has {size} "
                "rows: use the model's own tokenizer"
            )
