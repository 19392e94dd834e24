"""Every config that we ship is without mistakes and builds its model."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
import torchtune._recipe_registry as stock_registry
from omegaconf import DictConfig, OmegaConf
from torchtune import config as torchtune_config

from qst_tune import plugin
from qst_tune.config.check import config_problems
from qst_tune.config.keys import keys_of
from qst_tune.models import backbone_from_hf
from qst_tune.models.build import build_any_on_meta
from tests.support.configs import schema_of
from tests.support.published import PUBLISHED, write_published

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def recipe_of(path: Path):
    """The module of the recipe that the config is registered for."""
    recipes = stock_registry.get_all_recipes()
    (name,) = [r.name for r in recipes if name_of(path) in {c.name for c in r.configs}]
    return None if name in plugin._STOCK_RECIPES else import_module(f"qst_tune.recipes.{name}")


@pytest.fixture(params=FILES, ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def cfg(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DictConfig:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    cfg = OmegaConf.load(path)
    if "checkpoint_dir" in cfg:  # their model is the directory's
        cfg.checkpoint_dir = write_published(tmp_path, name_of(path))
    return cfg


def test_there_are_configs() -> None:
    assert FILES


def test_config_has_no_mistake_that_its_recipe_knows_of(path: Path, cfg: DictConfig) -> None:
    recipe = recipe_of(path)
    if recipe is None:
        pytest.skip("for a recipe of torchtune, which checks nothing")
    if "prompt" in cfg:
        cfg.prompt = "given on the command line"
    assert config_problems(cfg, keys_of(schema_of(recipe))) == []


def test_torchtune_validates_config(cfg: DictConfig) -> None:
    torchtune_config.validate(cfg)


def test_model_builds_without_memory(cfg: DictConfig) -> None:
    if cfg.model._component_.endswith(".described_model"):
        pytest.skip("a directory says which model: tests/sharing/test_hub_directory.py runs it")
    model = build_any_on_meta(cfg.model, torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = [*model.parameters(), *model.buffers()]  # integer codes are buffers
    assert 0 < trainable < 0.1 * sum(tensor.numel() for tensor in stored)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = backbone_from_hf(write_published(tmp_path, f"{name}_qst"))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][1]
    assert (CONFIGS / f"{name}_qst.yaml").is_file()
