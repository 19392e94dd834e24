"""What each of several processes stores of a run, and what it receives in a step.

Notation: N processes, B bytes of the backbone, R of them in the group that is whole during a step
(:func:`~qst_tune.distributed.sharding.group_bytes`), L the largest other group, S bytes of the
trainable parameters.
"""

from dataclasses import dataclass

from torchtune.modules import TransformerDecoder

from qst_tune.config.schema import StepConfig
from qst_tune.distributed.sharding import group_bytes, layers_with_backward
from qst_tune.modules.memory import GIB


@dataclass(frozen=True)
class Spread:
    """How a run is spread: over N processes (with ``mode`` "node", of one node).

    ``mode`` is ``backbone_sharding``; ``accumulation`` the batches of a step.
    """

    num_processes: int
    mode: str | None
    accumulation: int = 1

    @classmethod
    def of_config(cls, cfg: StepConfig, num_processes: int) -> "Spread":
        """Read ``backbone_sharding`` and ``gradient_accumulation_steps`` of a training config."""
        return cls(num_processes, cfg.backbone_sharding, cfg.gradient_accumulation_steps)

    @property
    def is_sharded(self) -> bool:
        """Whether the processes share one backbone."""
        return self.mode is not None and self.num_processes > 1

    def backbone_bytes(self, model: TransformerDecoder) -> int:
        r"""Bytes that a process stores of the backbone, B or :math:`\lceil B / N \rceil`.

        Each tensor may have a row more or less.
        """
        groups, rest = group_bytes(model)
        whole = sum(groups) + rest
        return -(-whole // self.num_processes) if self.is_sharded else whole

    def peak_bytes(self, model: TransformerDecoder, whole_peak: int) -> int:
        r"""Peak of a process, from above.

        .. math:: P - B + \lceil B / N \rceil + R + 2 L

        for a peak P (``whole_peak``) with the backbone whole: while a group runs, FSDP2 gathers the
        next one.
        """
        if not self.is_sharded:
            return whole_peak
        groups, rest = group_bytes(model)
        gathered = rest + 2 * max(groups)
        return whole_peak - sum(groups) - rest + self.backbone_bytes(model) + gathered

    def gathered_bytes(self, model: TransformerDecoder, *, has_reference: bool = False) -> int:
        r"""Bytes of frozen weights that a process receives in a step.

        .. math:: A \frac{N-1}{N} (B + E)

        with A batches a step. E are the bytes of the layers that a backward pass needs again, all
        of PEQA's and those with LoRA; twice with ``has_reference``, for preference learning runs
        these for its reference too. 0 if each process has its own backbone.
        """
        if not self.is_sharded:
            return 0
        groups, rest = group_bytes(model)
        num_again = len(layers_with_backward(model))
        again = sum(groups[len(groups) - num_again :]) * (1 + has_reference)
        return self.accumulation * self._from_others(sum(groups) + rest + again)

    def gradient_bytes(self, model: TransformerDecoder) -> int:
        r"""Bytes of gradients, :math:`2 \frac{N-1}{N} S`, that a process receives in a ring."""
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        return self._from_others(2 * trained)

    def _from_others(self, num_bytes: int) -> int:
        return num_bytes * (self.num_processes - 1) // self.num_processes


def spread_line(
    spread: Spread, model: TransformerDecoder, whole_peak: int, *, has_reference: bool = False
) -> str:
    """Report what each process stores and receives; GiB and MiB are 2^30 and 2^20 bytes."""
    held, peak = spread.backbone_bytes(model) / GIB, spread.peak_bytes(model, whole_peak) / GIB
    gathered = spread.gathered_bytes(model, has_reference=has_reference)
    most = "at most " if spread.is_sharded else ""
    return (
        f"each of {spread.num_processes} processes, backbone_sharding="
        f"{spread.mode or 'null'}: backbone {held:.2f} GiB, peak {most}{peak:.2f} GiB; receives a "
        f"step {gathered / GIB:.2f} GiB of frozen weights and "
        f"{spread.gradient_bytes(model) / 2**20:.1f} MiB of gradients"
    )
