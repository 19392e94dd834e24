"""Start from what was tuned before: a second data set, DPO after fine-tuning, a warm start.

A training config names the directory under the key of its method, ``side_network`` or ``scales``.
The run's result records where it began: its lineage, oldest first.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torchtune import utils

from qst_tune.config.schema import RUN, TrainingConfig
from qst_tune.errors import UserError
from qst_tune.results.description import FORMATS, Ancestor, TunedFormat, read_description
from qst_tune.results.recipe_config import read_recipe_config
from qst_tune.results.tuned_directory import read_tensors

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class Start:
    """A result of an earlier run, and its lineage with itself as the last entry."""

    directory: Path
    lineage: tuple[Ancestor, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors."""
        return self.lineage[-1].digest


def find_start(cfg: TrainingConfig) -> Start | None:
    """Find the result that the config names; None for a run that starts from the untuned model.

    UserError if the directory is no result of the method, damaged, or this run's own.
    """
    for key, form in FORMATS.items():
        directory: Path | None = getattr(cfg, key)
        if directory is not None:
            if directory.resolve() == (cfg.output_dir / key).resolve():
                raise UserError(
                    f"{key}={directory} is this run's own result: name another output_dir"
                )
            description = read_description(directory, form)
            digest = digest_of(read_tensors(directory, form))
            steps = description.results.get("steps")
            itself = Ancestor(_name(directory), digest, steps, tuple(_data(directory)))
            return Start(directory, (*description.lineage, itself))
    return None


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors on the CPU with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def result_to_load(named: Path | None, output_dir: Path | None, key: str) -> Path | None:
    """Choose the result that a recipe loads; None for the untuned model.

    In the config of a training run, ``key`` ("side_network" or "scales") may be ``named`` for what
    the run started from. If ``output_dir`` has the result of that run, the result is meant.
    """
    if named is None:
        return None
    result = output_dir / key if output_dir else None
    if named == RUN / key:
        return result
    if result is None or not _began_from(result, named, FORMATS[key]):
        return named
    log.info(
        f"{key}={named} is what the run in {output_dir} started from: its result {result} is "
        f"loaded; name another output_dir to load {named} itself"
    )
    return result


def _began_from(result: Path, start: Path, form: TunedFormat) -> bool:
    if not result.is_dir() or result.resolve() == start.resolve():
        return False
    try:
        lineage = read_description(result, form).lineage
        if not lineage:
            return False
        if not start.exists():  # moved or deleted since
            return lineage[-1].name == _name(start)
        return lineage[-1].digest == digest_of(read_tensors(start, form))
    except UserError:  # reported when one of them is loaded
        return False


def _name(directory: Path) -> str:
    """Run and directory, without the rest of the path, which is private."""
    return "/".join(directory.resolve().parts[-2:])


def _data(directory: Path) -> Iterator[str]:
    """Names of the files that a result was trained on; the card can do without."""
    blocks = read_recipe_config(directory).get("dataset")
    for block in blocks if isinstance(blocks, list) else [blocks]:
        if isinstance(block, dict):
            files = block.get("data_files") or block.get("source") or block.get("_component_")
            for file in files if isinstance(files, list) else [files]:
                yield Path(str(file)).name
