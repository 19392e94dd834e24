"""Runs that several files of tests look at, and never write to."""

from pathlib import Path

import pytest

from tests.support.checkpoints import Config
from tests.support.nine_steps import PLAIN_LOSS, SETTINGS, nine_steps_config
from tests.support.recipe_runs import FinetuneResult, finetune


@pytest.fixture(scope="session")
def nine_steps_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nine_steps")


@pytest.fixture(scope="session")
def nine_steps(nine_steps_root: Path) -> Config:
    return nine_steps_config(nine_steps_root)


@pytest.fixture(scope="session")
def whole(nine_steps: Config, nine_steps_root: Path) -> FinetuneResult:
    """All nine steps."""
    return finetune(nine_steps, nine_steps_root / "whole", *SETTINGS)


@pytest.fixture(scope="session")
def plain_whole(nine_steps: Config, nine_steps_root: Path) -> FinetuneResult:
    """With torch's own loss, which the losses of faults.py are."""
    directory = nine_steps_root / "plain_whole"
    return finetune(nine_steps, directory, *SETTINGS, PLAIN_LOSS, "batch_size_val=3")
