"""A flipped byte in any file of a result is found, or is one of those that cannot matter.

What a directory is checked with: ``sharing verify`` for a result beside its backbone, the manifest
for a checkpoint. Files without tensors, for people or for another start, are named in
:data:`CANNOT_MATTER`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.results.loading import load_directory
from qst_tune.sharing.inspection import verify_directory
from qst_tune.training.checkpoints import CheckpointStore
from tests.support.attacks import copy_of
from tests.support.directories import CPU

# Of a result. The card is text for people. recipe_config.yaml is how the run was made, config.json
# where transformers looks for the backbone: neither changes what the tensors compute. Of
# qst_config.json, figures, lineage, verdict and version are for people.
CANNOT_MATTER = {"README.md", "recipe_config.yaml", "config.json"}
FEW, MANY = 6, 400


def positions(size: int, count: int) -> Iterator[int]:
    """The first and last bytes and some between, always the same."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randint(size, (count,), generator=generator).tolist()
    yield from sorted({0, 7, 8, size - 1, *drawn} & set(range(size)))


def flip(path: Path, position: int) -> bytes:
    """Change one byte; returns what the file was."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[position] ^= 1 << (position % 8)
    path.write_bytes(changed)
    return data


def passing_flips(path: Path, count: int, passes: Callable[[], bool]) -> list[int]:
    """Positions whose flip lets ``passes`` be true, instead of false or a UserError."""
    passing = []
    for position in positions(path.stat().st_size, count):
        before = flip(path, position)
        try:
            if passes():
                passing.append(position)
        except UserError:
            pass
        path.write_bytes(before)
    return passing


def verifies(root: Path) -> bool:
    """Whether the run's result is verified; UserError if it is not."""
    verify_directory(root / "run/side_network", root / "model")
    return True


COUNTS = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


@pytest.fixture
def root(place: Path, tmp_path: Path) -> Path:
    """A model, a run and its result, to be changed."""
    return copy_of(place, tmp_path / "at")


@COUNTS
def test_each_flipped_byte_of_a_checkpoint_is_found(count: int, root: Path) -> None:
    store = CheckpointStore(root / "run/checkpoints")
    step = store.steps()[-1]
    files = [path for path in store.path(step).rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert store.damage(step) is None
    for path in files:
        passing = passing_flips(path, count, lambda: store.damage(step) is None)
        if path.name == "manifest.json":  # blanks between the digests of the other files
            passing = [at for at in passing if path.read_bytes()[at] not in b" \n"]
        assert passing == [], path.name


@COUNTS
def test_each_flipped_byte_of_a_results_weights_is_found(count: int, root: Path) -> None:
    result = root / "run/side_network"
    checked = {path.name for path in result.iterdir()} - CANNOT_MATTER
    assert checked == {"qst_config.json", "side_network.safetensors"}
    assert verifies(root)
    weights = result / "side_network.safetensors"
    assert passing_flips(weights, count, lambda: verifies(root)) == []


@torch.no_grad()
@COUNTS
def test_each_flipped_byte_of_a_description_is_found_or_changes_no_logit(
    count: int, root: Path
) -> None:
    result = root / "run/side_network"
    tokens = torch.arange(1, 9)[None]

    def logits() -> torch.Tensor:
        loaded = load_directory(result, root / "model", dtype=torch.float32, device=CPU)
        return loaded.model(tokens)

    expected = logits()
    others = passing_flips(
        result / "qst_config.json", count, lambda: not torch.equal(logits(), expected)
    )
    assert others == []


@COUNTS
def test_each_flipped_byte_of_a_backbone_is_found(count: int, root: Path) -> None:
    weights = root / "model/model.safetensors"
    assert verifies(root)
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    passing = passing_flips(weights, count // 4, lambda: verifies(root))
    assert [position for position in passing if position >= header] == []
