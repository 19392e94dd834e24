"""Whatever a directory's tokenizer files have, they load or are refused by one line.

``make test ARGS="-m slow tests/attacks/test_tokenizer_fuzzing.py"`` runs about a minute.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qst_tune.data import hf_chat_tokenizer
from qst_tune.errors import UserError
from qst_tune.terminal import shown
from tests.support.chat_directories import build_directory

pytestmark = pytest.mark.slow

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "day"}]
VALUES = st.sampled_from(
    [None, True, -1, 10**30, 1e400, "", "\ud800", [], {}, [[]], {"content": 3}, "x" * 10000,
     [1, "a", None], "{{", "{% for", "\x1b[2J", "{{ messages[9] }}"]
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_directory(tmp_path_factory.mktemp("tokenizer") / "m")
    (directory / FILES[2]).write_text('{"eos_token_id": 2}')
    return directory


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value inside; of a long list its begin."""
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value[:8]) if isinstance(value, list) else items
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(content: Any, place: tuple[Any, ...], value: Any, deletes: bool) -> Any:
    at = content
    for key in place[:-1]:
        at = at[key]
    if deletes:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return content


@given(name=st.sampled_from(FILES), data=st.data(), value=VALUES, deletes=st.booleans())
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_files_load_or_are_refused_by_one_line(
    directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    data: st.DataObject,
    value: Any,
    deletes: bool,
) -> None:
    target = tmp_path_factory.getbasetemp() / "changed"
    shutil.copytree(directory, target, dirs_exist_ok=True)
    content = json.loads((directory / name).read_text())
    place = data.draw(st.sampled_from(sorted(places(content), key=repr)))
    (target / name).write_text(json.dumps(changed(content, place, value, deletes)))
    message = ""
    try:
        tokenizer = hf_chat_tokenizer(str(target))
        assert all(isinstance(token, int) for token in tokenizer.stop_tokens)
        tokenizer.tokenize_conversation(CHAT)
    except UserError as error:
        message = str(error)
    assert len(message) < 2000
    assert shown(message) == message
    assert "\n" not in message
