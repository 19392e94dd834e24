"""Averages of trained side networks: of trials of one shape, and of one trial's checkpoints.

Source: model soups (https://arxiv.org/abs/2203.05482).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from qst_tune.distributed.processes import broadcast_tensors, gather_lists, is_main_process
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.training.trials import Trial, ranked, read_in_turn

_TENSORS = f"side_network/{SIDE_NETWORK.weights_file}"


@dataclass(frozen=True)
class Soup:
    """Results of which the mean is taken: files of tensors of the same names and shapes."""

    title: str
    number: int  # of the trial whose shape it has
    files: tuple[Path, ...]


@dataclass(frozen=True)
class ScoredSoup:
    """A side network with averaged tensors, and what it gives on the validation set."""

    soup: Soup
    side: SideNetwork
    figures: Mapping[str, float]


def best_soup(model: QSTModel, trials: Sequence[Trial]) -> ScoredSoup | None:
    """Score the soups of trials on their validation set, in one pass; return the best, if any.

    Collective: all ranks call it.
    """
    found = list(soups_of(trials)) if is_main_process() else []
    soups = gather_lists(found)
    if not soups:
        return None
    by_number = {trial.number: trial for trial in trials}
    sides = [_averaged(by_number[soup.number].side, soup.files) for soup in soups]
    owns = [
        (side, by_number[soup.number].reference) for side, soup in zip(sides, soups, strict=True)
    ]
    trainer = trials[0].trainer
    task, batches = trainer.task, trainer.validation_data
    assert batches is not None
    model.eval()
    figures = read_in_turn(model, owns, lambda: task.evaluating(model, batches))
    scored = list(map(ScoredSoup, soups, sides, figures))
    name = task.monitor.name
    finite = [one for one in scored if math.isfinite(one.figures[name])]
    return min(finite, key=lambda one: task.monitor.rank(one.figures[name]), default=None)


def soups_of(trials: Sequence[Trial]) -> list[Soup]:
    """Name the soups: of the best n trials of each kind, of the last n checkpoints of the best.

    The mean of networks that began at other values means nothing, so those of a kind have one seed
    and one start.
    """
    best_first = ranked(trials)
    if not best_first:
        return []
    groups: dict[object, list[Trial]] = {}
    for trial in best_first:
        groups.setdefault(_kind(trial), []).append(trial)
    soups = [
        _of_trials(group[:count]) for group in groups.values() for count in range(2, len(group) + 1)
    ]
    return soups + _of_checkpoints(best_first[0])


def _kind(trial: Trial) -> object:
    """What trials have in common that compute alike, from one start."""
    function = replace(trial.side.config, dropout=0.0, lora_dropout=0.0)
    return repr(function), trial.trainer.seed, trial.settings.get("side_network")


def _of_trials(trials: Sequence[Trial]) -> Soup:
    names = ", ".join(str(trial.number) for trial in trials)
    files = tuple(trial.trainer.run_log.directory / _TENSORS for trial in trials)
    return Soup(f"the mean of trials {names}", trials[0].number, files)


def _of_checkpoints(trial: Trial) -> list[Soup]:
    store = trial.trainer.checkpointing.store
    steps = [step for step in reversed(store.steps()) if store.damage(step) is None]
    return [
        Soup(
            f"the mean of trial {trial.number} at steps {', '.join(map(str, steps[:count]))}",
            trial.number,
            tuple(store.path(step) / _TENSORS for step in steps[:count]),
        )
        for count in range(2, len(steps) + 1)
    ]


@torch.no_grad()
def _averaged(like: SideNetwork, files: Sequence[Path]) -> SideNetwork:
    """A side network with the mean of tensors, which the first process reads."""
    side = copy.deepcopy(like).requires_grad_(False)
    if is_main_process():
        _load_mean(side, [load_file(file) for file in files])
    broadcast_tensors(side)
    return side


def _load_mean(side: nn.Module, each: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Take the mean, summed in fp64."""
    side.load_state_dict(
        {
            name: torch.stack([tensors[name].double() for tensors in each]).mean(0).to(value.dtype)
            for name, value in each[0].items()
        }
    )
