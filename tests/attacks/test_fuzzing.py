"""Random descriptions, headers and configs: only a UserError may come out, never another exception.

The slow suite searches for about a minute, the default suite tries a few examples; the environment
variable QST_TUNE_FUZZ_EXAMPLES sets how many the slow one tries. An input that fails is shrunk and
printed by hypothesis: add it to a table of this directory.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qst_tune.config.check import read_config
from qst_tune.config.file import parse_config
from qst_tune.config.schema import TrainingConfig
from qst_tune.errors import UserError, environment_error
from qst_tune.results.description import format_of, read_description
from qst_tune.sharing.inspection import inspect_directory
from tests.support.malformed import NESTED, VALUES

FEW, MANY = 25, int(os.environ.get("QST_TUNE_FUZZ_EXAMPLES", "300"))
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["os.system", "../x", "\x1b[31m", "qst_tune.models.qst_llama3_2", "nf4"]),
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(max_size=8), child),
    max_leaves=12,
)


CHECKS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {}


def fuzzed(**strategies: Any) -> Callable[[Any], Any]:
    """A check of drawn values, which :func:`test_only_user_errors_come_out` runs."""

    def add(check: Any) -> Any:
        CHECKS[check.__name__] = (check, strategies)
        return check

    return add


def paths_of(content: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in items:
        found.append((*before, key))
        if isinstance(value, (dict, list)):
            found += paths_of(value, (*before, key))
    return found


def written(place: Path, directory: Path, name: str, data: bytes) -> Path:
    """A copy of the result in which one file is another."""
    copy = directory / "result"
    copy.mkdir(exist_ok=True)
    for path in (place / "run/side_network").iterdir():
        target = copy / path.name
        target.unlink(missing_ok=True)
        if path.name != name:
            os.link(path, target)
    (copy / name).write_bytes(data)
    return copy


@fuzzed(value=JSON_VALUES, choice=st.integers(0, 10**6), more=JSON_VALUES)
def description(place: Path, directory: Path, value: Any, choice: int, more: Any) -> None:
    content = json.loads((place / "run/side_network/qst_config.json").read_text())
    for drawn, number in ((value, choice), (more, choice // 1000)):
        paths = paths_of(content)
        path = paths[number % len(paths)]
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = drawn
    result = written(place, directory, "qst_config.json", json.dumps(content).encode())
    read_description(result, format_of(result))
    inspect_directory(result)


@fuzzed(data=st.binary(max_size=200))
def bytes_as_description(place: Path, directory: Path, data: bytes) -> None:
    result = written(place, directory, "qst_config.json", data)
    read_description(result, format_of(result))


@fuzzed(value=JSON_VALUES, choice=st.integers(0, 10**6), cut=st.integers(0, 400))
def header_of_safetensors(place: Path, directory: Path, value: Any, choice: int, cut: int) -> None:
    data = (place / "run/side_network/side_network.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    paths = paths_of(header)
    path = paths[choice % len(paths)]
    inner = header
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + body[: len(body) - cut]
    inspect_directory(written(place, directory, "side_network.safetensors", changed))


@fuzzed(data=st.binary(max_size=300), size=st.integers(0, 2**64 - 1))
def bytes_as_safetensors(place: Path, directory: Path, data: bytes, size: int) -> None:
    changed = size.to_bytes(8, "little") + data
    inspect_directory(written(place, directory, "side_network.safetensors", changed))


KEYS = st.sampled_from([*TrainingConfig.__dataclass_fields__, *NESTED, "zzz", "model.zzz"])
TEXT_VALUES = st.sampled_from(VALUES) | st.text(max_size=30) | JSON_VALUES.map(json.dumps)


@fuzzed(changes=st.lists(st.tuples(KEYS, TEXT_VALUES), min_size=1, max_size=4))
def config(place: Path, directory: Path, changes: list[tuple[str, str]]) -> None:
    overrides = [f"{key}={value}" for key, value in changes]
    cfg = parse_config(
        ["--config", str(place / "config.yaml"), f"output_dir={directory}", *overrides]
    )
    read_config(cfg, TrainingConfig)


@fuzzed(data=st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def bytes_as_config(place: Path, directory: Path, data: bytes) -> None:
    path = directory / "config.yaml"
    path.write_bytes((place / "config.yaml").read_bytes() + b"\n" + data)
    read_config(parse_config(["--config", str(path)]), TrainingConfig)


def test_what_is_changed_is_accepted_as_it_is(place: Path) -> None:
    result = place / "run/side_network"
    assert read_description(result, format_of(result)).form.method == "qst"
    assert "fingerprint" in inspect_directory(result)
    read_config(parse_config(["--config", str(place / "config.yaml")]), TrainingConfig)


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHECKS)
def test_only_user_errors_come_out(name: str, examples: int, place: Path, tmp_path: Path) -> None:
    check, strategies = CHECKS[name]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples == FEW,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**strategies)
    def search(**drawn: Any) -> None:
        try:
            check(place, tmp_path, **drawn)
        except UserError:
            pass
        except OSError as error:  # the outermost layer reports what the disk refuses
            if environment_error(error) is None:
                raise

    search()
