"""Directories of side networks with random weights, as a training run leaves them."""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from qst_tune.atomic_files import write_directory
from qst_tune.models.build import build_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules.meta_device import materialize
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.results.peft_adapter import add_peft
from qst_tune.results.provenance import provenance_of
from qst_tune.results.tuned_directory import RECIPE_CONFIG, tuned_files
from tests.support.checkpoints import Config, finetune_config
from tests.support.configs import typed_config
from tests.support.numbers import randomize_

CPU = torch.device("cpu")


def side_network_directory(
    root: Path, name: str = "side_network", *, seed: int = 0, **model_settings: object
) -> tuple[Path, QSTDecoder]:
    """Write a directory over the model of :func:`tests.support.checkpoints.finetune_config`.

    Returns the directory, and the torchtune model it was saved from, loaded in fp32.
    """
    config: Config = finetune_config(root)
    config["model"] = {**config["model"], **model_settings}
    cfg = OmegaConf.create(config)
    model = build_on_meta(cfg.model, torch.float32)
    backbone = load_frozen_backbone(model, cfg.checkpointer, dtype=torch.float32, device=CPU)
    materialize(model.side, CPU)
    torch.manual_seed(seed)
    randomize_(model.side)
    origin = provenance_of(typed_config(cfg), backbone)
    origin = replace(origin, results={"validation loss at step 8": 1.25})
    files = add_peft(tuned_files(model.side, origin), model, origin.base_model)
    write_directory(root / name, files, private=[RECIPE_CONFIG])
    return root / name, model.eval()
