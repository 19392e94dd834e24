"""Repairs a backbone that is spread over processes: each keeps its rows of what all compute."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from qst_tune.backbone.repair import Repairs
from qst_tune.distributed.sharding import ShardedBackbone, free_weights
from qst_tune.modules.backbone import Backbone
from qst_tune.modules.qst_model import QSTModel

# Makes a linear of its path and its dense weight, rounded as the sharded one is.
Rounded = Callable[[str, torch.Tensor], nn.Module]


class ShardedRepairs(Repairs):
    """Fills the repairs of a sharded model: collective, and every process computes the same.

    Each reads every weight anyway, and of a repaired linear it keeps its own rows. The text goes
    through the sharded layers, with repairs of zeros. ``root`` is the path of the module below
    which :meth:`take` finds its names.
    """

    def __init__(
        self,
        model: QSTModel,
        sharded: ShardedBackbone,
        root: str,
        directory: Path,
        rank: int,
        rounded: Rounded,
    ) -> None:
        self._model, self._sharded, self._path = model, sharded, root
        self._make = rounded
        super().__init__(model.get_submodule(root), model.backbone, directory, rank)

    def _forget(self) -> None:
        for name, part in self._sharded.parts.items():
            if name.endswith((".repair.left", ".repair.right")):
                part.zero_()

    @torch.no_grad()
    def _run(self, backbone: Backbone, tokens: torch.Tensor) -> None:
        """Not the backbone alone: FSDP gathers what belongs to no layer for the whole model."""
        side, self._model.side.disabled = self._model.side.disabled, True
        head, self._model.skip_output_layer = self._model.skip_output_layer, True
        try:
            self._model(tokens)
        finally:
            self._model.side.disabled, self._model.skip_output_layer = side, head
            free_weights(self._model)

    def _rounded(self, path: str, weight: torch.Tensor) -> nn.Module:
        return self._make(path, weight)

    def _keep(self, path: str, linear: nn.Module) -> None:
        path = f"{self._path}.{path}" if self._path else path
        self._sharded.keep(path, linear)
        self._sharded.keep(f"{path}.repair", linear.get_submodule("repair"))
