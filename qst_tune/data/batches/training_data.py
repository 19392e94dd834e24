"""The data of a training run: which rows make which batch, and what a run can learn from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Subset
from torchtune.data import padded_collate_packed

from qst_tune.config.schema import TrainingConfig
from qst_tune.data.batches.checked_rows import hold_out
from qst_tune.data.batches.collate import DEFAULT_COLLATE, build_collate
from qst_tune.data.batches.datasets import build_dataset
from qst_tune.data.batches.loader import BatchLoader, Collate
from qst_tune.data.batches.packing import is_packed
from qst_tune.data.batches.schedule import describe_step, fit_step, schedule_of
from qst_tune.data.batches.survey import Survey, check_labels
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits

TEXT_KEY = "tokens"
PAIR_KEY = "chosen_input_ids"
_REASONS = {
    TEXT_KEY: "these are preferences, from which qst_dpo learns: tune run qst_dpo; or name the "
    "column to learn from, as in dataset.column_map.messages=chosen",
    PAIR_KEY: "rows need a chosen and a rejected answer (columns prompt, chosen, rejected); "
    "qst_finetune learns from rows with one answer",
}


@dataclass(frozen=True)
class TrainingData:
    """The batches of a run."""

    train: BatchLoader
    validation: BatchLoader | None
    surveys: Sequence[Survey] = ()  # figures of the datasets of the training rows
    validation_surveys: Sequence[Survey] = ()  # of the validation rows, if they have their own
    notes: Sequence[str] = ()  # what a user must know of them, one line each

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the content of all rows, by the names of ``resume.describe_data``."""
        surveys = {
            "training set": self.surveys,
            "validation set": self.validation_surveys or self.surveys,
        }
        return {
            name: " ".join(survey.digest for survey in some)
            for name, some in surveys.items()
            if some
        }


def text_collate(collate_fn: str | None, limits: ModelLimits) -> Collate:
    """Build the collate function of rows of text, after checking that they can fit the model."""
    longest = getattr(limits.tokenizer, "max_seq_len", None)
    if longest and longest > limits.max_seq_len:
        raise UserError(
            f"tokenizer.max_seq_len={longest} is longer than the model's max_seq_len "
            f"{limits.max_seq_len}: lower it"
        )
    return build_collate(limits, collate_fn or DEFAULT_COLLATE)


def build_data(
    cfg: TrainingConfig, limits: ModelLimits, collate: Collate, *, seed: int
) -> TrainingData:
    """Build the datasets, reading every row once, and decide which rows make which batch.

    ``collate`` makes a batch of unpacked rows. UserError if a dataset cannot be built, has a row
    outside ``limits``, or nothing to learn.
    """
    tokenizer = limits.tokenizer
    settings: dict[str, Any] = {"limits": limits, "skip_bad_rows": cfg.on_bad_row == "skip"}
    rows, surveys = build_dataset(cfg.dataset, "dataset", tokenizer, **settings)
    validation_rows: Any = None
    validation_surveys: list[Survey] = []
    if cfg.dataset_val:
        validation_rows, validation_surveys = build_dataset(
            cfg.dataset_val, "dataset_val", tokenizer, **settings
        )
    elif cfg.val_fraction:
        rows, validation_rows = hold_out(rows, cfg.val_fraction, seed)
    step = describe_step(cfg, len(rows), noun="packs" if is_packed(rows) else "rows")
    notes = [
        *_label_warnings("dataset", surveys, rows),
        *_label_warnings("validation rows", validation_surveys or surveys, validation_rows),
        *([step] if step else []),
    ]
    train = BatchLoader(
        rows,
        collate_of(rows, collate),
        batch_size=fit_step(cfg, len(rows))[0],
        seed=seed if cfg.shuffle else None,
        num_workers=cfg.num_workers,
        same_batches=cfg.hidden_state_cache is not None,
    )
    schedule_of(cfg, train)  # fails early, before the model loads
    validation = validation_rows and BatchLoader(
        validation_rows,
        collate_of(validation_rows, collate),
        batch_size=cfg.batch_size_val or cfg.batch_size,
        seed=None,
        drop_last=False,
        num_workers=cfg.num_workers,
    )
    return TrainingData(train, validation, surveys, validation_surveys, notes)


def check_rows(data: TrainingData, key: str) -> None:
    """Refuse rows without ``TEXT_KEY`` or ``PAIR_KEY``, and name the recipe for them."""
    for survey in (*data.surveys, *data.validation_surveys):
        if key not in survey.first:
            raise UserError(f"{survey.name}: {survey.description}: {_REASONS[key]}")


def _label_warnings(name: str, surveys: Sequence[Survey], rows: object) -> list[str]:
    """Warnings if some rows have nothing to learn; packs are judged by all of their rows."""
    if rows is None or not surveys:  # no such rows, or packs of the user's own code
        return []
    part = rows.indices if isinstance(rows, Subset) and not is_packed(rows) else None
    return [f"warning: {warning}" for warning in check_labels(name, surveys, part)]


def collate_of(rows: object, collate: Collate) -> Collate:
    """Choose the collate function of a dataset: torchtune's own for packs."""
    return padded_collate_packed if is_packed(rows) else collate
