"""Nothing trains on nothing: a dataset in which no token is learnt is refused, with the cause."""

from collections.abc import Sequence

from qst_tune.errors import UserError
from qst_tune.training.survey import Survey


def check_labels(
    name: str, surveys: Sequence[Survey], rows: Sequence[int] | None = None
) -> str | None:
    """Refuse rows of which none has a label.

    Args:
        name (str): of the rows, for messages.
        surveys (Sequence[Survey]): of the datasets that they come from.
        rows (Sequence[int] | None): their numbers in all of these; None for all rows.

    Returns:
        str | None: a warning, if some rows have none.

    Raises:
        UserError: if no row has a label, with the count and the cause.
    """
    labels = [count for survey in surveys for count in survey.labels]
    counts = labels if rows is None else [labels[row] for row in rows]
    missing = counts.count(0)
    if not missing:
        return None
    cause = _cause(surveys)
    if missing == len(counts):
        raise UserError(f"{name}: none of its {len(counts)} rows has a token to learn: {cause}")
    places = [survey.without_labels for survey in surveys if survey.without_labels]
    return (
        f"{name}: {missing} of {len(counts)} rows have no token to learn, such as {places[0]}: "
        f"{cause}"
    )


def _cause(surveys: Sequence[Survey]) -> str:
    limit = next((survey.limit for survey in surveys if survey.labels_lost), None)
    if limit is not None:
        return (
            f"the prompts alone fill tokenizer.max_seq_len={limit}, and the answers are cut off; "
            "raise it, or shorten the prompts"
        )
    return (
        "no assistant message is there, each is masked (weight 0, masked) or empty, or the chat "
        "template does not mark where it begins"
    )
