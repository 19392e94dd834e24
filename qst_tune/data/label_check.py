"""Nothing trains on nothing: a dataset in which no token is learnt is refused, with the cause."""

from collections.abc import Sequence

from qst_tune.data.survey import Survey
from qst_tune.errors import UserError

NO_LABEL = (
    "raise tokenizer.max_seq_len if prompts fill it, and check which messages the dataset masks"
)


def check_labels(
    name: str, surveys: Sequence[Survey], rows: Sequence[int] | None = None
) -> list[str]:
    """Return warnings of rows with no label, or one; UserError with the cause if no row has any.

    ``rows`` are numbers in all datasets of ``surveys`` together; None for all rows.
    """
    labels = [count for survey in surveys for count in survey.labels]
    counts = labels if rows is None else [labels[row] for row in rows]
    missing, single, number = counts.count(0), counts.count(1), len(counts)
    warnings = []
    if missing:
        cause = _cause(surveys)
        if missing == number:
            raise UserError(f"{name}: none of its {number} rows has a token to learn: {cause}")
        places = [survey.without_labels for survey in surveys if survey.without_labels]
        warnings.append(
            f"{name}: {missing} of {number} rows have no token to learn, such as {places[0]}: "
            f"{cause}"
        )
    if single and not any(survey.has_classes for survey in surveys):
        warnings.append(
            f"{name}: {single} of {number} rows have one token to learn, as an empty answer's end"
        )
    return warnings


def _cause(surveys: Sequence[Survey]) -> str:
    limit = next((survey.limit for survey in surveys if survey.labels_lost), None)
    if limit is not None:
        return (
            f"the prompts alone fill tokenizer.max_seq_len={limit}, and the answers are cut off; "
            "raise it, or shorten the prompts"
        )
    return (
        "there is no assistant message or text, all are masked (weight 0) or empty, or the chat "
        "template does not mark where answers begin"
    )
