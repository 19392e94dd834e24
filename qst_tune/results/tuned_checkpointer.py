"""A backbone and its side network as one checkpoint, for torchtune's own recipes."""

from pathlib import Path

import torch
from torchtune import training

from qst_tune.backbone.hub import model_name
from qst_tune.backbone.identity import BackboneId
from qst_tune.backbone.repair import repair_rank_of
from qst_tune.backbone.torchtune_loading import check_architecture, read_weights
from qst_tune.backbone.transformers import transformers_backbone
from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import quantization_of_backbone
from qst_tune.modules.qst_model import SIDE_PREFIX
from qst_tune.results.loading import build_described
from qst_tune.results.tuned_directory import read_tuned
from qst_tune.torchtune_compat import component_of


class TunedCheckpointer:
    """Reads what torchtune's recipes load into a QST model: the backbone and the side network.

    Stock recipes such as ``generate`` take one checkpoint with every weight of the model. In their
    configs this class replaces ``FullModelHFCheckpointer``, with one more key, ``side_network``;
    the weights are quantised as the model loads them. ``base_checkpointer`` reads
    ``checkpoint_dir``, with the further ``settings``.
    """

    def __init__(
        self,
        side_network: str,
        checkpoint_dir: str,
        *,
        base_checkpointer: str = "torchtune.training.FullModelHFCheckpointer",
        **settings: object,
    ) -> None:
        self.side_network = Path(side_network)
        self.checkpoint_dir = Path(checkpoint_dir)
        make = component_of(base_checkpointer)
        self._base = make(checkpoint_dir=checkpoint_dir, **settings)

    def load_checkpoint(self) -> dict[str, dict[str, torch.Tensor]]:
        """Read both, under torchtune's names below its ``MODEL_KEY``.

        UserError if they do not belong together, or one of them is missing or damaged.
        """
        model = build_described(self.side_network, torch.float32, self.checkpoint_dir)
        if transformers_backbone(model) is not None:
            raise UserError(
                f"{self.side_network} was tuned over transformers' own model, which torchtune's "
                "recipes do not run: use qst_generate or qst_evaluate, or qst_tune.transformers"
            )
        if repair_rank_of(model):
            raise UserError(
                f"{self.side_network} was tuned over a repaired backbone (repair_rank), which "
                "torchtune's recipes do not load: use qst_generate or qst_evaluate"
            )
        check_architecture(model, self.checkpoint_dir)
        weights: dict[str, torch.Tensor] = {}
        fingerprint = read_weights(model, self._base, weights.__setitem__)
        name, _ = model_name(self.checkpoint_dir)
        backbone = BackboneId(
            name, fingerprint.full, quantization_of_backbone(model), sampled=fingerprint.sampled
        )
        side = read_tuned(self.side_network, model.side, backbone=backbone)
        tuned = {SIDE_PREFIX + name: value for name, value in side.items()}
        return {training.MODEL_KEY: weights | tuned}
