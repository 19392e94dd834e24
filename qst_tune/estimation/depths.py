"""The price of each depth: what a step costs with LoRA in the last k of N layers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property

from qst_tune.estimation.estimate import (
    EstimateRequest,
    Price,
    batch_text,
    largest_batch,
    largest_batch_in_turn,
    last_that_fits,
    quick_and_quiet,
)
from qst_tune.estimation.fake_device import BATCH_LOOPS, first_and_last_parts
from qst_tune.estimation.step import Setup, trace_forward
from qst_tune.modules.memory import GIB
from qst_tune.modules.qst_model import QSTModel

ABOUT = """\
with LoRA in the last layers (model.lora_layers; * the config's): peak in GiB, operations of a
step over those of one pass forward, and over those of the first line"""
_SHARES = (10, 5, 4, 3, 2, 1)  # N over each of these is a line


@dataclass(frozen=True)
class Deepest:
    """The deepest ``lora_layers`` that fits at the config's batch size, and its largest batch."""

    lora_layers: int
    largest_batch: int
    at_once: int | None


class Depths:
    """Answers a request for a QST model for every ``lora_layers``.

    ``asked`` is the request for the config's own; ``build`` makes the step of another.
    """

    def __init__(self, asked: EstimateRequest, build: Callable[[int], Setup]) -> None:
        self._asked, self._build = asked, build
        model = asked.build().model
        self.own: int = model.side.config.lora_layers
        self.num_layers = len(model.layers)
        # LoRA alone needs a layer.
        self.least = 0 if model.side.layers else 1

    @cached_property
    def prices(self) -> list[Price]:
        """The price of a few depths from the least to all layers, and of the config's own."""
        shown = {self.least, self.own, *(round(self.num_layers / n) for n in _SHARES)}
        return [self._price(k) for k in sorted(shown) if k >= self.least]

    @cache  # noqa: B019
    def deepest(self) -> Deepest | None:
        """Find the deepest that fits into ``fit_gib``; None if no depth does."""
        limit = (self._asked.fit_gib or 0) * GIB
        fits = [price.peak_bytes <= limit for price in self.prices]
        if not fits[0]:
            return None
        depths = [price.lora_layers for price in self.prices]
        k = depths[-1]
        if not all(fits):
            first = fits.index(False)
            k = last_that_fits(self._peak, limit, depths[first - 1], depths[first])
        at_once = self._build(k).rows_at_once(self._asked.shape.seq_len)
        return Deepest(k, self._largest_batch(k, at_once, limit), at_once)

    def _largest_batch(self, lora_layers: int, at_once: int | None, limit: float) -> int:
        asked = self._at(lora_layers)
        known = {asked.shape.batch_size: self._peak(lora_layers)}

        def peak(batch_size: int) -> int:
            if batch_size not in known:
                shape = replace(asked.shape, batch_size=batch_size)
                with quick_and_quiet(), first_and_last_parts(*BATCH_LOOPS):
                    known[batch_size] = replace(asked, shape=shape).price(1).peak_bytes
            return known[batch_size]

        start, seq_len = asked.shape.batch_size, asked.shape.seq_len
        if at_once is None:
            return largest_batch(peak, limit, start=start)
        return largest_batch_in_turn(peak, limit, start=start, at_once=at_once, seq_len=seq_len)

    def report(self) -> str:
        """Report the deepest that fits into ``fit_gib``, and the largest batch with it."""
        asked, found = self._asked, self.deepest()
        about = (
            f"deepest lora_layers that fits in {asked.fit_gib:g} GiB at "
            f"{asked.shape.batch_size} x {asked.shape.seq_len} tokens: "
        )
        if found is None:
            return f"{about}none"
        batch = batch_text(found.largest_batch, found.at_once)
        return f"{about}{found.lora_layers} of {self.num_layers}, with a batch of {batch}"

    def table(self) -> str:
        """Lay the prices out as aligned text."""
        lines = [
            ABOUT,
            "",
            f"{'lora_layers':>12}{'peak':>9}{'trained, M':>12}{'forwards':>10}{'time':>7}",
        ]
        lines += [self._line(price) for price in self.prices]
        return "\n".join(lines)

    def _line(self, price: Price) -> str:
        star = "*" if price.lora_layers == self.own else " "
        return (
            f"{price.lora_layers:11}{star}{price.peak_bytes / GIB:9.2f}"
            f"{price.trainable_parameters / 1e6:12.1f}{price.forwards:10.2f}"
            f"{price.forwards / self.prices[0].forwards:7.2f}"
        )

    def figures(self) -> dict[str, object]:
        """Return the same for ``estimate.json``."""
        lines: dict[str, object] = {"depths": [asdict(price) for price in self.prices]}
        if self._asked.fit_gib is None:
            return lines
        found = self.deepest()
        return {**lines, "deepest": None if found is None else asdict(found)}

    def _at(self, lora_layers: int) -> EstimateRequest:
        return replace(self._asked, build=lambda: self._build(lora_layers))

    def _peak(self, lora_layers: int) -> int:
        return self._price(lora_layers).peak_bytes

    @cache  # noqa: B019  # lives as long as one request
    def _price(self, lora_layers: int) -> Price:
        with quick_and_quiet():
            return self._at(lora_layers).price(self._forward_flops)

    @cached_property
    def _forward_flops(self) -> float:
        asked = self._asked
        return trace_forward(asked.build(), asked.shape.seq_len, device=asked.device)


def depths_of(asked: EstimateRequest, build: Callable[[int], Setup]) -> Depths | None:
    """Return the depths of a request for a QST model; None for PEQA."""
    return Depths(asked, build) if isinstance(asked.build().model, QSTModel) else None
