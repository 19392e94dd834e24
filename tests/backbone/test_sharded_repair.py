"""Processes that share a backbone repair it to the bits of one that has all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor

from qst_tune.backbone.repair import repair_rank_of
from qst_tune.distributed.sharding import choose_sharding
from qst_tune.models.build import build_on_meta
from qst_tune.models.load import load_frozen_backbone
from tests.support.checkpoints import finetune_config
from tests.support.ranks import on_ranks
from tests.support.traffic import left_whole

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 27).view(2, 12)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loads_alike(config: dict[str, Any]) -> None:
    """By the recipes' own loader: identities, factors, rounded weights and outputs are equal."""
    models = []
    for mode in (None, "full"):
        cfg = OmegaConf.create(config)
        model, sharding = build_on_meta(cfg.model, torch.float32), choose_sharding(mode, CPU)
        where: Any = {"dtype": torch.float32, "device": CPU, "sharding": sharding}
        where["twin"] = build_on_meta(cfg.model, torch.float32)
        identity = load_frozen_backbone(model, cfg.checkpointer, **where)
        model.initialize_side(CPU)
        models.append((model.eval(), identity))
    (alone, expected), (sharded, identity) = models
    assert identity == expected
    assert repair_rank_of(sharded) == 4
    assert sharded.side.disabled is sharded.skip_output_layer is False
    assert not left_whole(sharded)
    repairs = {n: p for n, p in alone.named_parameters() if ".repair." in n}
    assert len(repairs) == 2 * 7 * len(alone.layers)
    shared = dict(sharded.named_parameters())
    for name, factor in repairs.items():
        assert torch.equal(whole(shared[name]), factor), name
    with torch.no_grad():
        assert torch.equal(sharded(TOKENS), alone(TOKENS))


@pytest.mark.parametrize("library", ["torchtune", "transformers"])
def test_a_sharded_backbone_is_repaired_as_a_whole_one(library: str, tmp_path: Path) -> None:
    config = finetune_config(tmp_path)
    config["model"] |= {"repair_rank": 4}
    if library == "transformers":
        config["model"] = {
            **{"_component_": "qst_tune.models.qst_from_hf", "repair_rank": 4},
            **{"checkpoint_dir": config["checkpointer"]["checkpoint_dir"], "reduction_factor": 4},
        }
    on_ranks(2, loads_alike, config)
