"""The key ``trials``: which runs share the frozen pass of one backbone, and what differs in them.

A block with one of ``list``, ``grid`` and ``random``, perhaps ``halving`` and ``soup``; a list
alone is short for ``list``. Keys are dotted, as on the command line, or nested::

    trials:
      grid: {optimizer.lr: [1e-3, 3e-3], model.reduction_factor: [8, 16]}
"""

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

from omegaconf import DictConfig, ListConfig, OmegaConf

from qst_tune.config.file import PlainConfig
from qst_tune.config.keys import ConfigT
from qst_tune.config.schema import TRAINING_KEYS
from qst_tune.errors import UserError, did_you_mean, nearest, question
from qst_tune.modules.side.config import SIDE_PARAMETERS

Settings: TypeAlias = dict[str, Any]  # value by dotted key

MOST_TRIALS = 256
TRIALS_DIRECTORY = "trials"  # in output_dir
_WAYS = ("list", "grid", "random")
_VARIED = ("optimizer", "lr_scheduler", "clip_grad_norm", "epochs", "seed", "side_network")
_SIDE = [f"model.{parameter.name}" for parameter in SIDE_PARAMETERS]
_OF_BACKBONE = ("model", "checkpointer", "dtype", "device", "backbone_sharding", "fsdp_cpu_offload")
_OF_BATCHES = (
    *("dataset", "dataset_val", "val_fraction", "tokenizer", "collate_fn", "on_bad_row"),
    *("batch_size", "batch_size_val", "gradient_accumulation_steps", "max_steps_per_epoch"),
    *("shuffle", "data_seed", "num_workers"),
)
_CHOICES = "optimizer, lr_scheduler, clip_grad_norm, epochs, seed, side_network or the side network"


@dataclass(frozen=True)
class Halving:
    """Successive halving (https://arxiv.org/abs/1502.07943): at which steps trials are given up."""

    first_step: int  # of the first choice, where each trial validates
    factor: int = 2  # of the trials, one in so many goes on; each stage is so many times longer

    def steps(self, num_steps: int) -> list[int]:
        """Return the steps of a run after which trials are given up, ascending."""
        powers = (self.first_step * self.factor**n for n in itertools.count())
        return list(itertools.takewhile(lambda step: step < num_steps, powers))


@dataclass(frozen=True)
class Trials(Generic[ConfigT]):
    """What differs from trial to trial, in the order of their numbers from 1."""

    settings: tuple[Settings, ...] = ()
    halving: Halving | None = None
    soup: bool = False  # whether averages of them are scored at the end
    configs: tuple[ConfigT, ...] = ()  # of each trial by itself


def parse_trials(block: DictConfig | ListConfig) -> "Trials[Any]":
    """Read the key ``trials``, without the configs.

    UserError for what is no choice of trials, or may not vary.
    """
    plain: Any = OmegaConf.to_container(block, resolve=True)
    if isinstance(plain, list):
        plain = {"list": plain}
    known = [*_WAYS, "halving", "soup"]
    unknown = sorted(map(str, plain.keys() - {*known}))
    if unknown:
        raise UserError(
            f"trials: unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}; it takes "
            "list, grid or random, halving and soup"
        )
    ways = [way for way in _WAYS if plain.get(way) is not None]
    if len(ways) != 1:
        raise UserError(
            f"trials: has {' and '.join(ways) or 'none'} of list, grid, random: set one"
        )
    settings = list(itertools.islice(_EXPAND[ways[0]](plain[ways[0]]), MOST_TRIALS + 1))
    _check(settings)
    soup = plain.get("soup") or False
    if type(soup) is not bool:
        raise UserError(f"trials.soup={soup} must be True or False")
    return Trials(tuple(settings), _halving(plain.get("halving")), soup)


def trial_config(raw: DictConfig, settings: Settings, number: int) -> DictConfig:
    """Return the config of a trial, with which it is the same run by itself.

    The order of samples stays that of the whole: ``data_seed`` is its ``seed``.
    """
    one = raw.copy()
    one.pop("trials")
    for name, value in settings.items():
        OmegaConf.update(one, name, value, force_add=True)
    if "seed" in settings and one.get("data_seed") is None:
        one.data_seed = raw.get("seed")
    one.output_dir = f"{raw.output_dir}/{TRIALS_DIRECTORY}/{number}"
    return one


def check_comparable(raw: DictConfig) -> None:
    """Refuse settings with which trials have no common order or no figure to choose by."""
    if raw.get("seed") is None:
        raise UserError("trials need seed, a number: all have the same batches in the same order")
    if not (raw.get("dataset_val") or raw.get("val_fraction")):
        raise UserError(
            "trials need a validation set to choose by: add dataset_val, or val_fraction=0.05"
        )
    if str(raw.metric_logger.get("_component_")).endswith((".WandBLogger", ".CometLogger")):
        raise UserError(
            f"trials: {raw.metric_logger._component_} has one run a process: use "
            "torchtune.training.metric_logging.TensorBoardLogger or DiskLogger"
        )
    if (raw.get("profiler") or {}).get("enabled", True) and raw.get("profiler"):
        raise UserError("trials run without a profiler: set profiler=null, or profile one run")


def title(settings: Settings) -> str:
    """Return settings as on the command line."""
    return " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


def _of_list(items: object) -> Iterator[Settings]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError("trials.list must be a list of blocks, as [{optimizer.lr: 1e-3}, {}]")
    yield from (dict(_flat(item)) for item in items)


def _of_grid(block: object) -> Iterator[Settings]:
    axes: Settings = dict(_flat(block)) if isinstance(block, dict) else {}
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"trials.grid: {name}={values} must be a list of values")
    if not axes:
        raise UserError("trials.grid must have keys with lists, as {optimizer.lr: [1e-3, 3e-3]}")
    for combination in itertools.product(*axes.values()):
        yield dict(zip(axes, combination, strict=True))


def _of_random(block: object) -> Iterator[Settings]:
    """Draw different settings; the same seed draws the same ones."""
    plain = dict(block) if isinstance(block, dict) else {}
    count, seed = plain.pop("n", None), plain.pop("seed", 0)
    axes = dict(_flat(plain))
    if type(count) is not int or count < 1 or type(seed) is not int or not axes:
        raise UserError(
            "trials.random must have n, a number of trials, perhaps a seed, and keys with ranges, "
            "as {n: 8, optimizer.lr: [1e-4, 1e-2, log]}"
        )
    generator = random.Random(seed)
    drawn: list[Settings] = []
    for _ in range(100 * count):
        settings = {name: _draw(name, axis, generator) for name, axis in axes.items()}
        if settings not in drawn:
            drawn.append(settings)
            yield settings
        if len(drawn) == count:
            return
    raise UserError(f"trials.random: n={count}, but its ranges hold {len(drawn)} different trials")


def _draw(name: str, axis: object, generator: random.Random) -> object:
    """Draw from ``{values: [...]}``, or from a range evenly, with ``log`` in its logarithm."""
    values = axis.get("values") if isinstance(axis, dict) else None
    if isinstance(values, list) and values:
        return generator.choice(values)
    low, high, scale = [*axis, None][:3] if isinstance(axis, list) and len(axis) > 1 else [0, 0, 0]
    numbers = [n for n in (low, high) if isinstance(n, int | float) and not isinstance(n, bool)]
    is_log = scale == "log"
    if len(numbers) < 2 or not low < high or scale not in (None, "log") or (is_log and low <= 0):
        raise UserError(
            f"trials.random: {name}={axis} must be [low, high], [low, high, log] with low above 0, "
            "or {values: [...]}"
        )
    at = (
        generator.uniform(math.log(low), math.log(high)) if is_log else generator.uniform(low, high)
    )
    value = math.exp(at) if is_log else at
    if all(isinstance(number, int) for number in numbers):
        return round(value) if is_log else generator.randint(low, high)
    return float(f"{value:.3g}")


_EXPAND = {"list": _of_list, "grid": _of_grid, "random": _of_random}


def _flat(block: PlainConfig, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield values by dotted key; ``{values: [...]}`` is one."""
    for name, value in block.items():
        key = f"{path}{name}"
        if isinstance(value, dict) and value and value.keys() != {"values"}:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _check(settings: list[Settings]) -> None:
    if not settings:
        raise UserError("trials.list is empty: name at least one trial, or set trials=null")
    if len(settings) > MOST_TRIALS:
        raise UserError(f"trials: there are more than {MOST_TRIALS}: try fewer at once")
    for name in dict.fromkeys(name for one in settings for name in one):
        reason = _why_not(name)
        if reason:
            raise UserError(f"trials: {name} {reason}")
    if any(one.get("seed", 0) is None for one in settings):
        raise UserError("trials: seed=None must be a number: no run could be made again")
    for number, one in enumerate(settings, start=1):
        if one in settings[: number - 1]:
            twin = settings.index(one) + 1
            raise UserError(
                f"trials: {twin} and {number} are the same ({title(one) or 'no change'})"
            )


def _why_not(name: str) -> str | None:
    """Return why trials cannot differ in a key; None if they can."""
    head = name.split(".")[0]
    if name in _SIDE or head in _VARIED:
        return None
    if head in _OF_BACKBONE:
        near = question(nearest(name, _SIDE, cutoff=0.9))
        return f"is of the backbone, which all trials share{near}; they may differ in {_CHOICES}"
    if head in _OF_BATCHES:
        return f"is of the batches, which all trials share; they may differ in {_CHOICES}"
    if head not in TRAINING_KEYS:
        return f"is no key{did_you_mean(name, [*_VARIED, *_SIDE])}"
    return f"is the same for all trials; they may differ in {_CHOICES}"


def _halving(block: object) -> Halving | None:
    if block is None:
        return None
    plain = dict(block) if isinstance(block, dict) else {}
    first, factor = plain.pop("first_step", None), plain.pop("factor", 2)
    if type(first) is not int or type(factor) is not int or first < 1 or factor < 2 or plain:
        raise UserError(
            "trials.halving must have first_step, the step of the first choice, and perhaps "
            "factor, 2 or more, as {first_step: 50, factor: 2}"
        )
    return Halving(first, factor)
