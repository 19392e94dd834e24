"""Run a function on several processes that form a gloo group, as torchrun would start them.

They are forked, so that imports cost nothing: two processes take a second where ``tune`` takes ten.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from omegaconf import DictConfig
from qst_tune.recipes import qst_finetune

from qst_tune.distributed.processes import process_group
from qst_tune.errors import UserError
from tests.support.checkpoints import Config
from tests.support.recipe_runs import FinetuneResult, merged


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, nodes: int = 1) -> None:
    """Call ``function(*arguments)`` on each of ``size`` processes, inside a process group."""
    _start(size, _in_group, (function, *arguments), nodes)


def finetune_on(
    size: int, config: Config, output_dir: Path, *overrides: str, recipe: Any = qst_finetune
) -> FinetuneResult:
    """Run a recipe on ``size`` processes; a user's mistake is told as the command line tells it."""
    run_on(size, recipe, merged(config, f"output_dir={output_dir}", *overrides))
    return FinetuneResult(output_dir)


def run_on(size: int, recipe: Any, cfg: DictConfig) -> None:
    """Run a recipe with a merged config on ``size`` processes."""
    _start(size, run_recipe, (recipe, cfg), 1)


def run_recipe(recipe: Any, cfg: DictConfig) -> None:
    """Run a recipe as the command line does: a user's mistake is a line and status 2."""
    try:
        recipe.main(cfg)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def unused_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: str, nodes: int = 1) -> dict[str, str]:
    """What torchrun sets."""
    local_size = size // nodes
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _start(size: int, function: Callable[..., Any], arguments: tuple[Any, ...], nodes: int) -> None:
    mp.start_processes(
        _rank, (size, unused_port(), nodes, function, arguments), size, start_method="fork"
    )


def _rank(
    rank: int, size: int, port: str, nodes: int, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= rank_environment(rank, size, port, nodes)
    torch.set_num_threads(1)
    function(*arguments)


def _in_group(function: Callable[..., Any], *arguments: Any) -> None:
    with process_group(torch.device("cpu")):
        function(*arguments)
