"""Instruction data from Python's own documentation: whole texts, clean split, stable bytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from qst_tune.data import hf_chat_tokenizer
from qst_tune.quickstart.docs_parser import parse_topic
from qst_tune.quickstart.python_docs import (
    DocsSplit,
    _make_examples,
    build_python_docs,
    choose_val_topics,
    demo_question,
)
from tests.support.chat_directories import build_directory

TOPIC = """\
The "frob" statement
********************

A "frob" statement frobs its operand in a non-
trivial way. [1] It is described
below:

   frob_stmt ::= "frob" expression

      indented more

It has two kinds:

* short ones, which
  take one line

* long ones

Changed in version 3.8: It was slower before.

The simple form is equivalent to

   if True:
       pass

+-----+-----+
| a   | b   |
+-----+-----+

frob.method(self, *args)
frob.other(self)

   Return the frobbed value.

   nested

      A nested definition.

Term one
   Its meaning.

Kinds of frobs
==============

There are kinds.

-[ Footnotes ]-

[1] Not really.
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> DocsSplit:
    return build_python_docs(tmp_path_factory.mktemp("docs"))


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def without_space(text: str) -> str:
    """Drop what wrapping changes; footnote marks too, the one thing that is left out of prose."""
    return re.sub(r"(?<=[\w.,)])\s+\[\d+\](?=[\s.,;)]|$)|\s", "", text)


def source_blocks() -> set[str]:
    """Every block between blank lines, list item, and body of a definition, without its space."""
    blocks = set()
    for text in topics.values():
        for block in re.split(r"\n\s*\n", text):
            items = re.split(r"\n(?=(?:\*|\d+\.|\([a-z\d]\)) )", re.sub(r"(?m)^ {3,}", "", block))
            body = block.partition("\n")[2]
            blocks.update(map(without_space, (block, body, *items)))
    return blocks


def test_parsed_topic() -> None:
    topic = parse_topic(TOPIC)
    assert topic.title == 'The "frob" statement'
    found = [(p.title, p.term, [(q.kind, q.text) for q in p.paragraphs]) for p in topic.passages]
    frob = 'The "frob" statement'
    assert found == [
        (
            frob,
            None,
            [
                (
                    "prose",
                    'A "frob" statement frobs its operand in a non-trivial way. It is described '
                    "below:",
                ),
                ("code", '   frob_stmt ::= "frob" expression'),
                ("code", "      indented more"),
                ("prose", "It has two kinds:"),
                ("item", "* short ones, which take one line"),
                ("item", "* long ones"),
                ("prose", "The simple form is equivalent to"),
                ("code", "   if True:\n       pass"),
            ],
        ),
        (
            frob,
            "frob.method(self, *args), frob.other(self)",
            [("prose", "Return the frobbed value.")],
        ),
        (frob, "nested", [("prose", "A nested definition.")]),
        (frob, "Term one", [("prose", "Its meaning.")]),
        ("Kinds of frobs", None, [("prose", "There are kinds.")]),
    ]


def test_text_without_title_gives_nothing() -> None:
    assert parse_topic("No title here.\n").passages == ()


def test_counts_are_those_of_the_files(split: DocsSplit) -> None:
    assert len(read_rows(split.train_path)) == split.num_train
    assert len(read_rows(split.val_path)) == split.num_val
    # 503 to 546 and 29 to 32 in Python 3.10 to 3.13.
    assert split.num_train > 300
    assert split.num_val > 15


def test_whole_topics_are_for_validation(split: DocsSplit) -> None:
    topic_of = {example.answer: example.topic for example in _make_examples(topics)}
    val_topics = choose_val_topics(topics)
    assert len(val_topics) == round(0.1 * len(topics))
    assert {topic_of[row["output"]] for row in read_rows(split.val_path)} <= val_topics
    assert not {topic_of[row["output"]] for row in read_rows(split.train_path)} & val_topics


def test_no_validation_text_or_question_is_trained_on(split: DocsSplit) -> None:
    """Topics repeat each other ("compound" holds "while"), so names alone would not show it."""
    train, val = read_rows(split.train_path), read_rows(split.val_path)
    trained = without_space("\n".join(row["output"] for row in train))
    for row in val:
        for paragraph in row["output"].split("\n\n"):
            text = without_space(paragraph)
            assert len(text) < 40 or text not in trained
    questions = [row["input"] for row in train + val]
    assert len(set(questions)) == len(questions)


def test_answers_are_whole_paragraphs_of_the_source(split: DocsSplit) -> None:
    blocks = source_blocks()
    for row in read_rows(split.train_path) + read_rows(split.val_path):
        for paragraph in row["output"].split("\n\n"):
            assert without_space(paragraph) in blocks, paragraph


def test_rows_are_filled_and_short(split: DocsSplit) -> None:
    for row in read_rows(split.train_path) + read_rows(split.val_path):
        assert set(row) == {"input", "output"}
        assert row["input"].strip()
        assert row["input"].endswith((".", "?"))
        assert 80 <= len(row["output"]) <= 640
        assert not row["output"].endswith(":")


def test_prose_has_no_hard_wraps(split: DocsSplit) -> None:
    for row in read_rows(split.train_path):
        for paragraph in row["output"].split("\n\n"):
            assert paragraph.startswith(" ") or "\n" not in paragraph


def test_bytes_are_the_same_in_another_process(split: DocsSplit, tmp_path: Path) -> None:
    """Another hash seed would show an order that depends on Python's own hash."""
    script = (
        "import sys; from pathlib import Path\n"
        "from qst_tune.quickstart.python_docs import build_python_docs\n"
        "build_python_docs(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    for path in (split.train_path, split.val_path):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_demo_question_is_a_validation_example(split: DocsSplit) -> None:
    row = demo_question(split)
    assert row in read_rows(split.val_path)
    assert row == demo_question(split)
    assert "\n\n" in row["output"]
    assert 'the "while" statement' in row["input"]


def test_loads_with_instruct_dataset_and_learns_the_answer_alone(
    split: DocsSplit, tmp_path: Path
) -> None:
    from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
    from torchtune.datasets import instruct_dataset

    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model")))
    dataset = instruct_dataset(
        tokenizer,
        source="json",
        data_files=str(split.val_path),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    rows = read_rows(split.val_path)
    assert len(dataset) == len(rows)
    for sample, row in zip(dataset, rows, strict=True):
        learnt = [label for label in sample["labels"] if label != CROSS_ENTROPY_IGNORE_IDX]
        text = tokenizer.decode(learnt, skip_special_tokens=False)
        assert text == row["output"] + "<|im_end|>"
        assert row["input"] in tokenizer.decode(sample["tokens"])
