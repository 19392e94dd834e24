"""How long a run takes, and when it validates and stops."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """When what happens, in optimizer steps.

    Args:
        epochs (int): passes over the data.
        steps_per_epoch (int): optimizer steps of each.
        accumulation (int): batches a step.
        validate_every (int | None): beside the start and the end of each epoch, which always do.
        patience (int | None): stop after so many validations in a row without a best one.
        max_bad_steps (int): leave out so many steps whose loss or gradient is not finite.
    """

    epochs: int
    steps_per_epoch: int
    accumulation: int = 1
    validate_every: int | None = None
    patience: int | None = None
    max_bad_steps: int = 0

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.steps_per_epoch
