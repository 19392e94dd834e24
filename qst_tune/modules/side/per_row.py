"""Several side networks over one backbone, each for some rows of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qst_tune.modules.batch_parts import where_of_rows
from qst_tune.modules.lora import LowRank
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.torchtune_compat import Mask

# What one network carries from block to block, or None where it has no row in the batch.
_States = list[torch.Tensor | None]
# All rows of a batch, those of an index, or none.
_Rows = slice | torch.Tensor | None


class SideNetworks(nn.Module):
    """Side networks that read the hidden states of one backbone pass, each for some rows.

    It takes the place of a :class:`~qst_tune.modules.side.network.SideNetwork` in a ``QSTModel``.
    :meth:`use` chooses the network of each row of the next batches; a row may also be the plain
    backbone's. The backbone runs once for all rows, and each network for its own rows alone, so a
    row gives what it gives by itself. Nothing is moved or copied to switch.

    Widths, ranks, downsamplers and mixes may differ between networks, which read the same layers:
    else a ValueError. With caches, rows may not change their network: begin a new sequence for
    that. torchtune's caches are of all rows of a batch; use :mod:`qst_tune.generation.caches`.
    ``disabled = True`` gives the plain backbone for all rows.
    """

    rows_are_alike = False

    def __init__(self, networks: Mapping[str, SideNetwork]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("there must be at least one side network")
        if len({tuple(network.layers) for network in networks.values()}) > 1:
            described = ", ".join(f"{name}: {net.layers}" for name, net in networks.items())
            raise ValueError(f"side networks must read the same layers ({described})")
        self.names = list(networks)
        self.networks = nn.ModuleList(networks.values())
        self.layers: list[int] = next(iter(networks.values())).layers
        first = [net.lora.first for net in networks.values() if net.lora is not None]
        self.lora = _LoRAOfRows(self, min(first)) if first else None
        self.disabled = False
        self._rows: list[_Rows] = []
        self._num_rows: int | None = None
        self.use(self.names[0])

    @property
    def blocks(self) -> list[nn.Module]:
        """The side blocks of all networks, those of the first network first."""
        return [block for network, _ in self.each() for block in network.blocks]

    def adapter_params(self) -> list[str]:
        """Names of the trainable parameters, relative to this module: all of them."""
        return [name for name, _ in self.named_parameters()]

    def use(self, names: str | Sequence[str | None]) -> None:
        """Choose the networks of the next batches; ValueError if a name is unknown.

        ``names`` is one name for all rows of batches of any size, or a name for each row, where
        None is the plain backbone.
        """
        of_rows = [names] if isinstance(names, str) else names
        if unknown := sorted({name for name in of_rows if name is not None} - set(self.names)):
            raise ValueError(f"no side network {unknown[0]!r}; loaded: {', '.join(self.names)}")
        self._num_rows = None if isinstance(names, str) else len(names)
        self._rows = [_rows_of(name, of_rows) for name in self.names]

    def take_rows(self, tokens: torch.Tensor) -> None:
        """Prepare for a batch ``[B, T]``; ValueError if :meth:`use` named more or fewer rows."""
        if self._num_rows not in (None, len(tokens)):
            raise ValueError(f"use() named {self._num_rows} rows, the batch has {len(tokens)}")
        # Here, once a batch: every move of an index stops a GPU.
        self._rows = [
            rows.to(tokens.device) if isinstance(rows, torch.Tensor) else rows
            for rows in self._rows
        ]

    def start(self, h_BTD: torch.Tensor) -> _States:
        """Compute each network's first state, of its rows, from the embedding."""
        return [
            None if rows is None else network.start(h_BTD[rows]) for network, rows in self.each()
        ]

    def step(
        self,
        index: int,
        h_BTD: torch.Tensor,
        states: _States,
        *,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> _States:
        """Advance each network by one block; hidden states, mask and positions are of all rows."""
        following: _States = []
        for (network, rows), state in zip(self.each(), states, strict=True):
            if rows is None or state is None:
                following.append(None)
                continue
            where: dict[str, Mask | None] = {"mask": mask, "input_pos": input_pos}
            if not isinstance(rows, slice):
                where = where_of_rows(where, rows, len(h_BTD))
            following.append(network.step(index, h_BTD[rows], state, **where))
        return following

    def finish(self, f_BTD: torch.Tensor, states: _States) -> torch.Tensor:
        """Compute the input of the LM head; a row without network is that of ``f_BTD``."""
        if not self.layers:
            return f_BTD
        mixed = f_BTD.clone()
        for (network, rows), state in zip(self.each(), states, strict=True):
            if rows is not None and state is not None:
                own = network.finish(f_BTD[rows], state)
                if isinstance(rows, slice):
                    return own
                mixed[rows] = own
        return mixed

    def each(self) -> list[tuple[SideNetwork, _Rows]]:
        """Return each network with its rows of the next batch."""
        networks: Any = self.networks  # ModuleList hides their methods
        return list(zip(networks, self._rows, strict=True))


class _LoRAOfRows:
    """Each network's LoRA in the layers of one backbone, for that network's rows.

    A network without rows in the batch changes nothing. It only evaluates.
    """

    def __init__(self, networks: SideNetworks, first: int) -> None:
        self.networks, self.first = networks, first

    @contextmanager
    def trained(self, layers: nn.ModuleList) -> Iterator[None]:
        """Let the layers compute with the LoRA of each row."""
        with ExitStack() as stack:
            for network, rows in self.networks.each():
                if network.lora is None or rows is None:
                    continue
                for index in range(network.lora.first, len(layers)):
                    for path, pair in network.lora.pairs(index).items():
                        linear = layers[index].get_submodule(path)
                        hook = partial(_add_to_rows, pair, rows)
                        stack.callback(linear.register_forward_hook(hook).remove)
            yield


def _add_to_rows(
    pair: LowRank,
    rows: slice | torch.Tensor,
    linear: nn.Module,
    args: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    x = args[0]
    if isinstance(rows, slice):
        return pair.added_to(output, x)
    if x.ndim < 3:
        raise ValueError(
            f"a {type(linear).__name__} of this backbone mixes the rows of a batch: side networks "
            "with lora_layers can share it only if all rows of a batch use one of them"
        )
    change: torch.Tensor = pair(x[rows])
    return output.index_add(0, rows, change.to(output.dtype))


def _rows_of(name: str, names: Sequence[str | None]) -> _Rows:
    own = [row for row, wanted in enumerate(names) if wanted == name]
    if len(own) == len(names):
        return slice(None)  # of a batch of one network alone no row is copied
    return torch.tensor(own) if own else None


def share_backbone(model: QSTModel, networks: Mapping[str, SideNetwork]) -> SideNetworks:
    """Replace a model's side network, in place, by several; the first one is in use."""
    shared = SideNetworks(networks).train(model.training)
    model.add_module("side", shared)
    return shared
