"""One frozen pass of a batch for several side networks that take turns over one backbone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from qst_tune.modules.backbone import Visit
from qst_tune.modules.side.compute import normalized
from qst_tune.modules.side.network import SideNetwork
from qst_tune.torchtune_compat import Mask


def frozen_part(sides: Iterable[SideNetwork]) -> tuple[list[int], int | None]:
    """Return what side networks together ask of the frozen layers, as states are counted.

    These are the states that they read below their LoRA, ascending, and the last one that any of
    them needs; None is f, behind the final norm.
    """
    taps: set[int] = set()
    ends: set[int | None] = set()
    for side in sides:
        own = {0, *(layer + 1 for layer in side.layers)} if side.layers else set()
        first = None if side.lora is None else side.lora.first
        taps |= own if first is None else {tap for tap in own if tap <= first}
        ends.add(first)
    until = None if None in ends else max(end for end in ends if end is not None)
    return sorted(taps | {end for end in ends - {until} if end is not None}), until


@dataclass
class _Pass:
    """What is kept of one pass: the states that side networks read, and those that passes end with.

    They are found by number; f of the whole model by None.
    """

    tokens: torch.Tensor
    where: dict[str, Mask | None]
    readers: int  # that have not read them yet
    shown: dict[int, torch.Tensor] = field(default_factory=dict)
    ends: dict[int | None, torch.Tensor] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)

    def is_of(self, tokens: torch.Tensor, where: dict[str, Mask | None]) -> bool:
        """Whether it was of this batch; positions tell packed batches with a BlockMask apart."""
        return _is_same(self.tokens, tokens) and all(
            _is_same(self.where.get(name), where.get(name)) for name in {*self.where, *where}
        )

    def keep(self, number: int, state: torch.Tensor) -> None:
        """Keep a state that networks read."""
        self.shown[number], self.versions[number] = state, state._version

    def read(self, number: int) -> torch.Tensor:
        """Return a state that networks read; the last reader frees it."""
        state = self.shown[number] if self.readers else self.shown.pop(number)
        changed = state._version != self.versions[number]
        assert not changed, "a frozen layer has changed a state in place"
        return state


class SharedPass:
    """Hidden states of one batch, kept while several side networks read them one after the other.

    Nothing in the frozen layers of QST trains, so the first network's pass over a batch serves all:
    what the others read is the same memory. ``begin`` forgets a batch, and its last reader frees
    each state as it reads it. So ``states B T D`` numbers are kept, of one batch, however many
    networks there are; and none that the running network does not save itself, if all of them
    normalise (``normalize_hidden``) and save what they read: that is one tensor for all. ``sides``
    may read different layers and have LoRA in different ones. Not in the paper.
    """

    def __init__(self, sides: Sequence[SideNetwork]) -> None:
        self.taps, self.until = frozen_part(sides)
        self.firsts = {side.lora.first for side in sides if side.lora is not None}
        self.normalizes = all(side.config.normalize_hidden for side in sides if side.layers)
        self.readers = 1
        self.num_passes = 0  # that were computed
        self._passes: list[_Pass] = []

    def begin(self, readers: int) -> None:
        """Begin a batch that so many networks read; 1 keeps nothing."""
        self.readers = readers
        self._passes = []

    def run(
        self,
        compute: Callable[..., torch.Tensor],
        tokens: torch.Tensor,
        *,
        taps: Sequence[int],
        visit: Visit,
        until: int | None,
        **where: Mask | None,
    ) -> torch.Tensor:
        """Do what ``compute(taps=, visit=, until=)`` does, if another network has not before."""
        found = next((one for one in self._passes if one.is_of(tokens, where)), None)
        if found is None:
            self.num_passes += 1
            if self.readers == 1:
                return compute(taps=taps, visit=visit, until=until)
            return self._keep(compute, _Pass(tokens, where, self.readers), taps, visit, until)
        found.readers -= 1
        last_BTD = found.ends[until]
        for tap in taps:
            visit(found.read(tap))
        if not found.readers:
            self._passes.remove(found)
        return last_BTD

    def _keep(
        self,
        compute: Callable[..., torch.Tensor],
        kept: _Pass,
        taps: Sequence[int],
        visit: Visit,
        until: int | None,
    ) -> torch.Tensor:
        numbers = iter(self.taps)

        def show(h_BTD: torch.Tensor) -> None:
            number = next(numbers)
            if number in self.firsts:
                kept.ends[number] = h_BTD
            if self.normalizes:
                h_BTD = normalized(h_BTD)
            kept.keep(number, h_BTD)
            if number in taps:
                visit(h_BTD)

        kept.ends[self.until] = compute(taps=self.taps, visit=show, until=self.until)
        kept.readers -= 1
        self._passes.append(kept)
        return kept.ends[until]


def _is_same(one: object, other: object) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other)
    if one is other:
        return True
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
