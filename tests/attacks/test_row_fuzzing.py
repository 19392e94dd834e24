"""Whatever is in a file, each row is tokenized, or refused by one line that a terminal shows.

``make test ARGS="-m slow tests/attacks/test_row_fuzzing.py"`` runs about a minute.
"""

import csv
import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qst_tune.data import HFChatTokenizer
from qst_tune.data.batches.datasets import build_dataset
from qst_tune.errors import UserError
from qst_tune.terminal import shown
from tests.support.rows import SHAREGPT, TURNS, chat_tokenizer

pytestmark = pytest.mark.slow

FORMS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"conversations": SHAREGPT},
    {"instruction": "a", "input": "b", "output": "c"},
    {"prompt": "a", "completion": "b"},
    {"input": "a", "output": "b"},
    {"text": "a"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": "{}"}}]}], "tools": "[]"},
]  # fmt: skip
KEYS = sorted({key for form in FORMS for key in form} | {"role", "content", "from", "value",
              "weight", "tool_calls", "function", "name", "arguments", "id", "system"})  # fmt: skip
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", "\0", "\x1b[2J", "\ud800", "[" * 2000, "{}", "user", "gpt", "tool", "</think>", "\u202e"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=3)
    ),
    max_leaves=12,
)
ROWS = st.sampled_from(FORMS) | st.builds(
    lambda form, key, value: {**form, key: value},
    st.sampled_from(FORMS),
    st.sampled_from(KEYS),
    VALUES,
)
# Positions, in a thousandth of the file, and what is put there in the place of some bytes.
EDITS = st.lists(
    st.tuples(
        st.integers(0, 999),
        st.integers(0, 40),
        st.binary(max_size=12)
        | st.sampled_from(
            [b"\n", b'"', b"\\", b"[" * 5000, b"\xff\xfe", b"\0", b"\\udfff", b"NaN"]
        ),
    ),
    max_size=3,
)


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[Any]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, sorted({key for row in rows for key in row}))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def parquet(rows: list[Any]) -> bytes:
    stream = io.BytesIO()
    columns = {key: [json.dumps(row.get(key)) for row in rows] for row in rows for key in row}
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


WRITERS = {
    "r.jsonl": jsonl,
    "r.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "r.csv": table,
    "r.tsv": table,
    "r.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "r.parquet": parquet,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFChatTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), max_seq_len=64)


def edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, put in edits:
        start = len(content) * place // 1000
        content = content[:start] + put + content[start + length :]
    return content


def read(block: dict[str, Any], tokenizer: HFChatTokenizer, skips: bool) -> str | None:
    """Read all rows; the message if they are refused."""
    try:
        dataset, _ = build_dataset(
            OmegaConf.create(block), "dataset", tokenizer, skip_bad_rows=skips
        )
        for tokens in (tokens for row in dataset for tokens in row.values()):
            assert all(isinstance(token, int) for token in tokens)
            assert len(tokens) <= 64
    except UserError as error:
        return str(error)
    return None


@given(
    name=st.sampled_from(sorted(WRITERS)),
    rows=st.lists(ROWS, min_size=1, max_size=4),
    edits=EDITS,
    skips=st.booleans(),
)
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_are_read_or_refused_by_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: HFChatTokenizer,
    name: str,
    rows: list[Any],
    edits: list[tuple[int, int, bytes]],
    skips: bool,
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / name
    path.write_bytes(edited(WRITERS[name](rows), edits))
    block = {"_component_": "qst_tune.data.auto_dataset", "data_files": str(path)}
    began = time.monotonic()
    refusal = read(block, tokenizer, skips)
    assert refusal is None or len(refusal) < 2000
    assert refusal is None or (shown(refusal) == refusal and "\n" not in refusal)
    assert time.monotonic() - began < 5
