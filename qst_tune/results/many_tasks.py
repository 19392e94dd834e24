"""Load several side networks over one backbone."""

from collections.abc import Mapping
from pathlib import Path

import torch

from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.per_row import SideNetworks, share_backbone
from qst_tune.results.described_model import build_described
from qst_tune.results.side_network import load_side_network


def load_side_networks(
    model: QSTModel,
    directories: Mapping[str, Path],
    *,
    backbone: BackboneId,
    backbone_directory: Path | None = None,
) -> SideNetworks:
    """Load side networks by name and put them in the place of a model's own, ``model.side``.

    The backbone is left alone; ``side.use`` chooses a network. ``backbone_directory`` is the
    backbone's directory, where a side network's model is built from it; None: where it was at its
    training. UserError if a directory is no side network of this backbone, or they read different
    layers.
    """
    weight: torch.Tensor = model.tok_embeddings.weight
    networks = {}
    for name, directory in directories.items():
        described = build_described(directory, weight.dtype, backbone_directory)
        described.side.materialize(weight.device)
        load_side_network(directory, described.side, backbone=backbone)
        networks[name] = described.side.requires_grad_(False).eval()
    try:
        return share_backbone(model, networks)
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, directories.values()))}: {error}") from error
