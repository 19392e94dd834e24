"""Whether a run made the model better, by its own validation."""

from collections.abc import Mapping


def verdict(
    values: Mapping[int, float],
    best_step: int | None,
    *,
    name: str,
    higher_is_better: bool,
    before: str,
) -> str | None:
    """Compare the validated steps with what the run began from.

    Args:
        values (Mapping[int, float]): the figure by step; step 0 is before training.
        best_step (int | None): the step of the result; None if none was measured.
        name (str): of the figure.
        higher_is_better (bool): its direction.
        before (str): what step 0 is: "quantised base model".

    Returns:
        str | None: what is wrong; None if nothing is, or nothing was measured.
    """
    if best_step is None or best_step not in values or 0 not in values:
        return None
    sign = 1 if higher_is_better else -1
    start, best, last = values[0], values[best_step], values[max(values)]
    title = "validation loss" if name == "val_loss" else name
    if sign * best <= sign * start:
        return (
            f"no validated step is better than the {before}: {title} {best:.4f} at step "
            f"{best_step}, {start:.4f} before training"
        )
    if sign * last < sign * start:
        return (
            f"the run ended worse than the {before}: {title} {last:.4f} at step {max(values)}, "
            f"{start:.4f} before training; the result is of step {best_step}: {best:.4f}"
        )
    return None
