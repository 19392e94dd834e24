"""Quantized Side Tuning as the training loop sees it."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torchtune import utils

from qst_tune.backbone.experts import compile_forward
from qst_tune.backbone.identity import BackboneId
from qst_tune.distributed.processes import broadcast_tensors, rank_and_world_size
from qst_tune.models.setup import load_frozen_backbone
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.output_mix import AlphaMix, SigmoidMix
from qst_tune.results.provenance import provenance_of
from qst_tune.results.side_network import load_side_network, side_network_files
from qst_tune.results.start import find_start
from qst_tune.results.tuned_directory import Provenance
from qst_tune.training.parameter_groups import parameter_groups

REFUSED = {
    "scales": "is what PEQA starts from; use side_network",
    "enable_activation_offloading": "has nothing to offload, since QST saves no activation of the "
    "backbone; set it to False",
}

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class QSTMethod:
    """A frozen backbone with a side network that trains; see ``training.method.Method``.

    ``provenance`` is what the result's directory says of the run, except for its figures.
    """

    model: QSTModel
    provenance: Provenance

    result_name: ClassVar[str] = "side_network"

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the side network's parameters: those that decay, and the rest."""
        return parameter_groups(self.model.side)

    def files(self, results: dict[str, float]) -> dict[str, bytes]:
        """Return the side network as files by name; ``results`` are figures for the model card."""
        provenance = replace(self.provenance, results=results)
        return side_network_files(self.model.side, provenance)

    def load(self, directory: Path) -> None:
        """Fill the side network from a directory; UserError if it does not fit."""
        load_side_network(directory, self.model.side, backbone=self.provenance.backbone)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Return how far the gates are open and how much of the output is the side network's."""
        side = self.model.side
        betas = torch.cat([torch.sigmoid(p).flatten() for p in side.gates.parameters()])
        figures = {
            "gate_mean": betas.mean().item(),
            "gate_min": betas.min().item(),
            "gate_max": betas.max().item(),
            "upsample_rms": side.upsample.get_parameter("weight").square().mean().sqrt().item(),
        }
        if isinstance(side.output_mix, AlphaMix):
            figures["mix_mean"] = side.output_mix.alpha.mean().item()
        elif isinstance(side.output_mix, SigmoidMix):
            figures["mix_mean"] = torch.sigmoid(side.output_mix.logit).mean().item()
        return figures


def load_qst(
    model: QSTModel, cfg: DictConfig, *, dtype: torch.dtype, device: torch.device
) -> QSTMethod:
    """Fill a model that was built on meta: the backbone from its checkpoint; a new side network.

    The side network starts from what ``side_network`` names, if the config has it. ``compile`` and
    ``enable_activation_checkpointing`` decide as in torchtune. UserError if the checkpoint is
    missing, damaged or not of this architecture, or what the run starts from does not fit.
    """
    backbone = load_frozen_backbone(model, cfg, dtype=dtype, device=device)
    model.initialize_side(device)
    start = find_start(cfg)
    if start is not None:
        load_side_network(start.directory, model.side, backbone=backbone)
    broadcast_tensors(model.side)
    model.side.recompute = cfg.get("enable_activation_checkpointing", False)
    if cfg.get("hidden_state_cache"):
        model.hidden_state_cache = _hidden_state_cache(model, cfg, backbone, dtype, device)
    if cfg.get("compile"):
        layers: Any = model.layers
        compile_forward([*layers, *model.side.blocks])
    return QSTMethod(model, provenance_of(cfg, backbone, start.lineage if start else ()))


def _hidden_state_cache(
    model: QSTModel,
    cfg: DictConfig,
    backbone: BackboneId,
    dtype: torch.dtype,
    device: torch.device,
) -> HiddenStateCache:
    """The cache for this backbone, its dtype, this kind of device and these layers."""
    side: Any = model.side
    described = (asdict(backbone), str(dtype), device.type, side.layers)
    key = hashlib.sha256(repr(described).encode()).hexdigest()[:16]
    name = backbone.name.replace("/", "--")
    directory = Path(cfg.hidden_state_cache) / f"{name}-{key}"
    if rank_and_world_size()[0] == 0:
        size = (len(side.layers) + 1) * side.upsample.out_features * dtype.itemsize
        log.info(f"hidden states are cached in {directory}: {size / 1000:.1f} kB a token")
    return HiddenStateCache(directory)
