"""PEQA as the training loop sees it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig

from qst_tune.backbone.experts import compile_forward
from qst_tune.models.setup import load_frozen_backbone
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.results.provenance import provenance_of
from qst_tune.results.scales import load_scales, scales_files
from qst_tune.results.start import find_start
from qst_tune.results.tuned_directory import Provenance


@dataclass(frozen=True)
class PEQAMethod:
    """An integer model of which the scales train; see :class:`~qst_tune.training.method.Method`.

    ``provenance`` is what the result's directory says of the run, except for its figures.
    """

    model: PEQAModel
    provenance: Provenance

    result_name: ClassVar[str] = "scales"

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the scales, in one group."""
        return [{"params": list(self.model.task().values())}]

    def files(self, results: dict[str, float]) -> dict[str, bytes]:
        """Return the scales as files by name; ``results`` are figures for the model card."""
        provenance = replace(self.provenance, results=results)
        return scales_files(self.model, provenance)

    def load(self, directory: Path) -> None:
        """Exchange the scales for those of a directory; UserError if it does not fit."""
        load_scales(directory, self.model, backbone=self.provenance.backbone)

    def statistics(self) -> dict[str, float]:
        """Return nothing: scales of different layers have no common size to log."""
        return {}


def load_peqa(
    model: PEQAModel, cfg: DictConfig, *, dtype: torch.dtype, device: torch.device
) -> PEQAMethod:
    """Fill a model that was built on meta from its checkpoint, rounding weight by weight.

    The scales start from those of the config's directory ``scales``, if it has one. ``compile`` and
    ``enable_activation_checkpointing`` decide as in torchtune. UserError if the checkpoint is
    missing, damaged or not of this architecture, or what the run starts from does not fit.
    """
    backbone = load_frozen_backbone(model, cfg, dtype=dtype, device=device)
    start = find_start(cfg)
    if start is not None:
        load_scales(start.directory, model, backbone=backbone)
    if cfg.get("compile"):
        compile_forward(model.layers)
    if cfg.get("enable_activation_checkpointing"):
        model.recompute_layers()
    return PEQAMethod(model, provenance_of(cfg, backbone, start.lineage if start else ()))
