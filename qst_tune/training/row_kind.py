"""Rows that another recipe learns from are refused, naming it."""

from qst_tune.errors import UserError
from qst_tune.training.trainer_setup import TrainingData

TEXT_KEY = "tokens"
PAIR_KEY = "chosen_input_ids"
_REASONS = {
    TEXT_KEY: "these are preferences, from which qst_dpo learns: tune run qst_dpo; or name the "
    "column to learn from, as in dataset.column_map.messages=chosen",
    PAIR_KEY: "rows need a chosen and a rejected answer (columns prompt, chosen, rejected); "
    "qst_finetune learns from rows with one answer",
}


def check_rows(data: TrainingData, key: str) -> None:
    """Refuse rows without ``TEXT_KEY`` or ``PAIR_KEY``, and name the recipe for them."""
    for survey in (*data.surveys, *data.held_out_surveys):
        if key not in survey.first:
            raise UserError(f"{survey.name}: {survey.description}: {_REASONS[key]}")
