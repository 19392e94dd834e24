"""A stand-in for a CUDA device's graphs: replaying does the work again, on the CPU."""

from collections.abc import Callable

import torch

from qst_tune.modules.captured_passes import CapturedPasses


class StandInGraphs:
    """Counts records and replays."""

    num_records = 0
    num_replays = 0

    def rehearse(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        work()
        self.num_records += 1

        def replay() -> None:
            self.num_replays += 1
            with torch.enable_grad():  # autograd calls from where it is off
                work()

        return replay

    def same_random_numbers(self):
        return torch.random.fork_rng([])

    def pool_bytes(self) -> int:
        return 0


def stand_in_passes() -> tuple[CapturedPasses, StandInGraphs]:
    """Captured passes, and the device that records them."""
    device = StandInGraphs()
    return CapturedPasses(lambda _: device), device
