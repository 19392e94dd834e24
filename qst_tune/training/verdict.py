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
    """Compare the validated steps with step 0, what the run began from.

    Returns what is wrong; None if nothing is, or nothing was measured. ``before`` names step 0, as
    in "quantised base model"; ``best_step`` is the step of the result.
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
