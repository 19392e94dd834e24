"""What a model can read: token ids of its embedding and LM head, and a number of tokens.

A tokenizer may know more tokens than the model: one was added to it without resizing the embedding,
or it is another model's. An index outside an embedding is a traceback on a CPU, and on a GPU an
assertion that ends the process.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TransformerDecoder
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.errors import UserError

# Fields of a row that hold one sequence's tokens, with those that hold its labels.
SEQUENCES = (
    ("tokens", "labels"),
    ("chosen_input_ids", "chosen_labels"),
    ("rejected_input_ids", "rejected_labels"),
)


@dataclass(frozen=True)
class ModelLimits:
    """What a model can read, and the tokenizer and the label without loss of its rows.

    Ids of tokens are below ``vocab_size``, those of labels below ``num_logits``.
    """

    vocab_size: int
    num_logits: int
    max_seq_len: int
    tokenizer: ModelTokenizer
    ignore_index: int = CROSS_ENTROPY_IGNORE_IDX

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding id, or 0 where the embedding lacks it: padding is never seen."""
        pad_id = getattr(self.tokenizer, "pad_id", None)
        return pad_id if isinstance(pad_id, int) and 0 <= pad_id < self.vocab_size else 0

    def problem(self, row: dict[str, Any]) -> str | None:
        """Return why the model cannot read a row or a pack: its length or an id; None if it can."""
        length = max(lengths_of(row), default=0)
        if length > self.max_seq_len:
            return _too_long(length, self.max_seq_len)
        for tokens, labels in SEQUENCES:
            for outside in _outside(row.get(tokens), self.vocab_size, None):
                return f"token {self._named(outside)} {self._sizes('embedding', self.vocab_size)}"
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


def limits_of(
    model: TransformerDecoder,
    tokenizer: ModelTokenizer,
    ignore_index: int = CROSS_ENTROPY_IGNORE_IDX,
) -> ModelLimits:
    """Return what a model can read; it may be on meta."""
    size = model.tok_embeddings.num_embeddings
    # A head that is tied, whatever is around it, has the embedding's rows.
    num_logits = getattr(model.output, "out_features", size)
    return ModelLimits(size, num_logits, model.max_seq_len, tokenizer, ignore_index)


def lengths_of(row: dict[str, Any]) -> list[int]:
    """Return the number of tokens of each sequence of a row: one, or two for a preference."""
    return [len(row[tokens]) for tokens, _ in SEQUENCES if tokens in row]


def _too_long(length: int, max_seq_len: int) -> str:
    return (
        f"a row of {length} tokens is longer than the model's max_seq_len {max_seq_len}: set "
        f"tokenizer.max_seq_len={max_seq_len} or lower to truncate rows"
    )


def check_length(tokens: torch.Tensor, max_seq_len: int) -> None:
    """Refuse a batch ``[B, T]`` that is longer than the model can read."""
    if tokens.shape[1] > max_seq_len:
        raise UserError(_too_long(tokens.shape[1], max_seq_len))


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


FP16_RANGE = (
    "; dtype=fp16 ends at 65504, and activations of some models (Gemma's among them) exceed it: "
    "use dtype=bf16, or fp32 where the device has no bf16"
)


def overflow_hint(model: nn.Module) -> str:
    """Return the end of an error message that names fp16 as the cause; empty in other dtypes."""
    return FP16_RANGE if any(p.dtype == torch.float16 for p in model.parameters()) else ""


def check_finite(values: torch.Tensor, model: nn.Module, what: str) -> None:
    """Refuse NaN or infinity in what ``model`` computed; ``what`` names the values."""
    if not values.isfinite().all():
        raise UserError(f"{what} of the model are not finite{overflow_hint(model)}")
