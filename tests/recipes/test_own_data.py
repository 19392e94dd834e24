"""A user's own files: each usual form trains and answers; a malformed one is one helpful line."""

import codecs
import gzip
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf
from qst_tune.recipes import qst_dpo, qst_finetune, qst_generate

from qst_tune.config.cli import run_recipe
from qst_tune.training.run_log import RunSummary
from tests.support.checkpoints import Config, finetune_config, generate_config, write_config
from tests.support.recipe_runs import finetune, one_thread
from tests.support.rows import SHAREGPT, TURNS

GOOD = {"messages": TURNS}
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


def lines(*rows: Any) -> bytes:
    """JSON lines; text is a line as it is."""
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    return "".join(text + "\n" for text in texts).encode()


def parquet(*rows: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), content)
    return content.getvalue()


def zipped(content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("r.jsonl", content)
    return archive.getvalue()


class Malformed(NamedTuple):
    """A file of rows, and what its message must say: where, what, and the fix."""

    name: str
    file: str
    content: bytes
    message: str
    settings: tuple[str, ...] = ()


def at(row: int, line: int | None = None) -> str:
    """The beginning of a message about a row."""
    return f"row {row} of {{f}}{f' (line {line})' if line else ''} cannot be used: .*"


TURN = TURNS[0]
FILES = [
    Malformed(
        "truncated JSON lines",
        "r.jsonl",
        lines(GOOD, GOOD)[:-9],
        at(1, 2) + "it is not JSON at column .*; mend or delete the line",
    ),
    Malformed(
        "truncated JSON list",
        "r.json",
        json.dumps([GOOD] * 3, indent=1).encode()[:-20],
        "{f} is not JSON at line .*; mend it there, or write one object a line",
    ),
    Malformed(
        "single quotes",
        "r.jsonl",
        lines(str(GOOD)),
        at(0, 1) + "it is not JSON at column 2: Expecting property",
    ),
    Malformed(
        "trailing comma", "r.jsonl", lines(GOOD, '{"messages": [],}'), at(1, 2) + "it is not JSON"
    ),
    Malformed(
        "duplicate keys",
        "r.jsonl",
        lines(GOOD, '{"messages": 1, "messages": 2}'),
        at(1, 2) + "the key 'messages' is there twice in one object: delete one",
    ),
    Malformed(
        "NaN",
        "r.jsonl",
        lines('{"input": "a", "output": "b"}', '{"input": "a", "output": NaN}'),
        at(1, 2) + "NaN is no value of JSON: write null, or delete",
    ),
    Malformed(
        "lists instead of objects",
        "r.jsonl",
        lines(["a", "b"], ["c", "d"]),
        at(0, 1) + "it is a list .*, not an object of columns",
    ),
    Malformed(
        "numbers instead of objects",
        "r.jsonl",
        lines(1, 2),
        at(0, 1) + "it is a number (1), not an object",
    ),
    Malformed(
        "row of another kind",
        "r.jsonl",
        lines(GOOD, {"text": "a"}),
        at(1, 2) + "it has no column 'messages': its columns are text",
    ),
    Malformed(
        "mixed types",
        "r.jsonl",
        lines({"text": "a"}, {"text": 7}),
        at(1, 2) + "column 'text' is a number (7): it must be text",
    ),
    Malformed(
        "nested null",
        "r.jsonl",
        lines(GOOD, {"messages": [TURN, None]}),
        at(1, 2) + "messages[1] is null: a message has a role and a content",
    ),
    Malformed(
        "null answer",
        "r.jsonl",
        lines(GOOD, {"messages": [TURN, {**TURNS[1], "content": None}]}),
        at(1, 2) + "messages[1].content is null: it must be text",
    ),
    Malformed(
        "null column",
        "r.jsonl",
        lines({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}),
        at(1, 2) + "column 'output' is null: it must be text",
    ),
    Malformed(
        "no messages",
        "r.jsonl",
        lines(GOOD, {"messages": []}),
        at(1, 2) + "column 'messages' is empty: it must be a list of messages",
    ),
    Malformed(
        "unknown role",
        "r.jsonl",
        lines(GOOD, {"messages": [{**TURN, "role": "narrator"}]}),
        at(1, 2) + "messages[0]: role 'narrator' is unknown: use system, user",
    ),
    Malformed(
        "unknown speaker",
        "r.jsonl",
        lines({"conversations": SHAREGPT}, {"conversations": [{"from": "bing", "value": "a"}]}),
        at(1, 2) + "conversations[0]: role 'bing' is unknown: use .*(gpt)",
    ),
    Malformed(
        "picture",
        "r.jsonl",
        lines(GOOD, {"messages": [{**TURN, "content": [{"type": "image_url", "image_url": "x"}]}]}),
        at(1, 2) + "messages[0].content has a part of type 'image_url': only text",
    ),
    Malformed(
        "arguments that are no JSON",
        "r.jsonl",
        lines(
            GOOD,
            {
                "messages": [
                    TURN,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}],
                    },
                ]
            },
        ),
        at(1, 2) + "messages[1].tool_calls[0].arguments is text that is not JSON",
    ),
    Malformed(
        "assistant first",
        "r.jsonl",
        lines(GOOD, {"messages": [TURNS[1]]}),
        at(1, 2) + "the chat template refuses this conversation: roles must alternate",
        (f"tokenizer.chat_template={STRICT}",),
    ),
    Malformed(
        "two answers in a row",
        "r.jsonl",
        lines(GOOD, {"messages": [*TURNS, TURNS[1]]}),
        at(1, 2) + "the chat template refuses this conversation: roles must alternate",
        (f"tokenizer.chat_template={STRICT}",),
    ),
    Malformed(
        "no answers at all",
        "r.jsonl",
        lines(*[{"messages": [TURN]}] * 3),
        "dataset: none of its 3 rows has a token to learn: there is no assistant message",
    ),
    Malformed(
        "row of a million characters",
        "r.jsonl",
        lines(GOOD, {"text": "x", "messages": [{**TURN, "content": "x" * 10**6}, TURNS[1]]}),
        at(1, 2)
        + "tokens is longer than the model's max_seq_len 128: set tokenizer.max_seq_len=128",
        ("tokenizer.max_seq_len=null",),
    ),
    Malformed(
        "preferences",
        "r.jsonl",
        lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        r"{f}: form chosen, rejected: these are preferences, from which qst_dpo learns: tune run",
    ),
    Malformed(
        "columns of nothing",
        "r.jsonl",
        lines({"question": "a", "answer": "b"}),
        "have the columns question, answer, .* set dataset.column_map.input=question dataset",
    ),
    Malformed(
        "map of nothing",
        "r.jsonl",
        lines(GOOD),
        "column_map.text=body: there is no column 'body', only messages",
        ("dataset.column_map.text=body",),
    ),
    Malformed(
        "Latin-1",
        "r.jsonl",
        lines(GOOD) + '{"messages": "é"}\n'.encode("latin-1"),
        at(1, 2) + "it is not UTF-8 (byte 0xe9 at 14): save the file as UTF-8",
    ),
    Malformed(
        "UTF-16",
        "r.jsonl",
        codecs.BOM_UTF16_LE + lines(GOOD).decode().encode("utf-16-le"),
        "{f} is UTF-16: save it as UTF-8",
    ),
    Malformed("empty file", "r.jsonl", b"", "dataset: {f} has no rows"),
    Malformed("blank lines", "r.jsonl", b"\n \n\n", "dataset: {f} has no rows"),
    Malformed("empty list", "r.json", b"[]", "dataset: {f} has no rows"),
    Malformed(
        "several lists",
        "r.json",
        json.dumps({"train": [GOOD], "test": [GOOD]}).encode(),
        r"{f} has several lists of rows (train, test): save the one to use",
    ),
    Malformed(
        "CSV without header",
        "r.csv",
        b"what is 1,it is 1\nwhat is 2,it is 2\n",
        "the rows have the columns what is 1, it is 1, and no form has these",
    ),
    Malformed(
        "CSV of one column",
        "r.csv",
        b"label\n1\n2\n",
        "the rows have the columns label, .* set dataset.column_map.text=label",
    ),
    Malformed(
        "CSV of semicolons",
        "r.csv",
        b"input;output\na;b\n",
        "{f}: the header 'input;output' has one column; separate columns by commas",
    ),
    Malformed(
        "ragged CSV",
        "r.csv",
        b"input,output\na,b\na,b,c\n",
        at(1, 3) + "it has 3 fields and the header 2 (input, output): put quotes",
    ),
    Malformed(
        "open quote in CSV",
        "r.csv",
        b'input,output\n"a,b\nc,d\n',
        "{f} is not CSV at line 3: .*; quotes inside a value are doubled",
    ),
    Malformed("header of CSV alone", "r.csv", b"input,output\n", "dataset: {f} has no rows"),
    Malformed(
        "Parquet of numbers",
        "r.parquet",
        parquet({"text": 1}, {"text": 2}),
        at(0) + "column 'text' is a number (1): it must be text",
    ),
    Malformed(
        "Parquet with nulls",
        "r.parquet",
        parquet({"text": "a"}, {"text": None}),
        at(1) + "column 'text' is null",
    ),
    Malformed(
        "truncated Parquet",
        "r.parquet",
        parquet({"text": "a"})[:-5],
        "{f} is not a whole Parquet file: ",
    ),
    Malformed(
        "truncated gzip",
        "r.jsonl.gz",
        gzip.compress(lines(*[GOOD] * 9))[:-9],
        "{f} is not a whole gzip file: ",
    ),
    Malformed(
        "archive",
        "r.zip",
        zipped(lines(GOOD)),
        "data_files={f}: its ending is none of .jsonl, .* convert it, or name its format",
    ),
    Malformed("spreadsheet", "r.xlsx", b"PK", "data_files={f}: its ending is none of "),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A model, and a config whose dataset is yet to be named."""
    root = tmp_path_factory.mktemp("own")
    config = finetune_config(root)
    dataset = {"_component_": "qst_tune.data.auto_dataset", "data_files": None, "source": "hub/x"}
    return root, {**config, "dataset": dataset, "dataset_val": None}


def pattern(message: str, path: Path) -> str:
    """Only ``.*`` of a message stands for anything."""
    parts = message.replace("{f}", str(path)).split(".*")
    return ".*".join(map(re.escape, parts))


def fail(
    main: Callable[..., None], root: Path, config: Config, path: Path, *settings: str
) -> int | str | None:
    file = write_config(root / "config.yaml", {**config, "output_dir": str(root / "out")})
    sys.argv = ["recipe", "--config", str(file), f"dataset.data_files={path}", *settings]
    with one_thread(), pytest.raises(SystemExit) as info:
        run_recipe(main)
    return info.value.code


@pytest.mark.parametrize("malformed", FILES, ids=lambda malformed: malformed.name)
def test_malformed_file_is_one_line_with_place_and_fix(
    malformed: Malformed,
    template: tuple[Path, Config],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    path = tmp_path / malformed.file
    path.write_bytes(malformed.content)
    settings = malformed.settings
    assert fail(qst_finetune.main, tmp_path, template[1], path, *settings) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(pattern(malformed.message, path), line), line
    assert line.startswith("error: dataset: ")
    assert not (tmp_path / "out").exists()


def test_bad_rows_of_every_kind_can_be_left_out(
    template: tuple[Path, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["{", {"messages": []}, {"text": "a"}, '{"messages": NaN}']
    (tmp_path / "r.jsonl").write_bytes(lines(bad[0], GOOD, *bad[1:], *[GOOD] * 4))
    settings = [f"dataset.data_files={tmp_path / 'r.jsonl'}", "on_bad_row=skip"]
    run = finetune(template[1], tmp_path / "run", *settings)
    assert len(run.train_loss) == 1
    printed = capsys.readouterr().out
    assert "5 rows, " in printed
    assert "4 rows dropped (on_bad_row=skip):" in printed
    assert f"row 0 of {tmp_path / 'r.jsonl'} (line 1) cannot be used: it is not JSON" in printed


def test_preferences_are_needed_for_dpo(
    template: tuple[Path, Config],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "r.jsonl").write_bytes(lines({"input": "a", "output": "b", "id": 3}))
    config = {**template[1], "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}
    assert fail(qst_dpo.main, tmp_path, config, tmp_path / "r.jsonl") == 2
    error = capfd.readouterr().err
    assert "form input, output; not read: id: rows need a chosen and a rejected answer" in error


QUESTIONS = [f"what is the colour of box {i}" for i in range(4)]
ANSWERS = ["it is red", "it is blue", "it is pink", "it is grey"]
PAIRS = list(zip(QUESTIONS, ANSWERS, strict=True))
FORMS = {
    "messages.jsonl": lines(
        *(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
            for question, answer in PAIRS
        )
    ),
    "conversations.json": json.dumps(
        [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in PAIRS
        ]
    ).encode(),
    "alpaca.csv": "\n".join(
        ["instruction,output", *(f"{question},{answer}" for question, answer in PAIRS)]
    ).encode(),
    "completions.parquet": parquet(*({"prompt": q, "completion": a} for q, a in PAIRS)),
    "pairs.tsv": "\r\n".join(["input\toutput", *(f"{q}\t{a}" for q, a in PAIRS)]).encode(),
}


def test_five_forms_train_alike_and_the_result_answers(
    template: tuple[Path, Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RunSummary, "_plot", lambda summary, path: None)  # slow, and not looked at
    root, config = template
    losses = {}
    for name, content in FORMS.items():
        (tmp_path / name).write_bytes(content)
        # Fewer rows than a step of 4 x 4: it fits itself to them.
        epochs = 3 if losses else 40
        settings = ["gradient_accumulation_steps=4", f"epochs={epochs}", "seed=1"]
        directory = tmp_path / f"run_of_{epochs}"
        run = finetune(config, directory, f"dataset.data_files={tmp_path / name}", *settings)
        losses[name] = run.train_loss.tolist()
        printed = capsys.readouterr().out
        assert f"dataset: {tmp_path / name}: form " in printed
        assert f">>>{ANSWERS[0]}<|im_end|><<<" in printed
        assert "a step has 4, as 1 x 4" in printed
    first, *others = losses.values()
    assert others == [first[:3]] * 4
    assert len(first) == 40
    assert first[-1] < 0.1
    settings = {
        "side_network": str(tmp_path / "run_of_40" / "side_network"),
        "prompt": QUESTIONS[2],
    }
    with one_thread():
        qst_generate.main(OmegaConf.create({**generate_config(root), **settings}))
    assert ANSWERS[2] in capsys.readouterr().out
