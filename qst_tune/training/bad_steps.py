"""Messages about steps without a label, and steps whose loss or gradient is not finite."""

from collections.abc import Mapping

from qst_tune.data.batches.checked_rows import row_numbers
from qst_tune.data.batches.loader import BatchLoader
from qst_tune.data.batches.read_once import ReadOnce
from qst_tune.data.batches.schedule import Schedule
from qst_tune.data.batches.survey import NO_LABEL
from qst_tune.distributed.processes import gather_lists
from qst_tune.errors import UserError


def rows_of_step(train: BatchLoader | ReadOnce, schedule: Schedule, step: int) -> str:
    """Return the numbers of the rows of step ``step``, counted from 0, as text. Collective."""
    epoch, index = divmod(step, schedule.steps_per_epoch)
    first = index * schedule.accumulation
    batches = train.rows(epoch)[first : first + schedule.accumulation]
    rows = gather_lists([row for batch in batches for row in row_numbers(train.dataset, batch)])
    return ", ".join(map(str, rows))


def describe_bad_step(step: int, metrics: Mapping[str, float], rows: str) -> str:
    """Describe a step whose loss or gradient is not finite, as the beginning of a sentence."""
    return (
        f"step {step}: the loss is {metrics['loss']} and the gradient's norm "
        f"{metrics['grad_norm']} (rows {rows} of the dataset)"
    )


def bad_step_error(what: str, hint: str) -> UserError:
    """Return the error of a run that ends before a step that is not finite."""
    return UserError(
        f"{what}: stopped before it; lower optimizer.lr, set clip_grad_norm, mend those rows, "
        f"or set skip_bad_steps=<how many> to skip such steps{hint}"
    )


def empty_step_warning(step: int, rows: str) -> str:
    """Warn of the first step without a label."""
    return (
        f"warning: step {step} learns nothing, since none of its rows ({rows} of the dataset) "
        f"has a label: {NO_LABEL}"
    )


def empty_steps_warning(empty: int, steps: int) -> str | None:
    """Warn at the end of steps without a label; UserError if no step had one."""
    if empty and empty == steps:
        raise UserError(f"dataset: no step had a label, so nothing was learnt: {NO_LABEL}")
    if not empty:
        return None
    return f"warning: {empty} of {steps} steps had no label and changed nothing: {NO_LABEL}"
