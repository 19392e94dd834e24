import json
import math
from itertools import islice

import pytest
import torch

from benchmarks.study.tasks import BATCH_SIZE, IGNORE, MAX_TOKENS, TASKS, Task, load_task


def encode(text):
    """A word is a token, and its id the same in every text."""
    return [sum(word.encode()) for word in text.replace("\n", " ").split()]


class WordTokenizer:
    """Stands in for a Hugging Face tokenizer."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return encode(text)

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        turns = [f"<{message['role']}> {message['content']}" for message in messages]
        return " ".join([*turns, "<assistant>"])


TOKENIZER = WordTokenizer()


@pytest.fixture
def data(tmp_path):
    """Three rows to train on and two held out, in the form of each dataset."""
    rows = {
        "sst2": (
            "train_sentences",
            [{"sentence": f"fine film {i}", "label": i % 2} for i in range(5)],
        ),
        "rte": (
            "train",
            [
                {"sentence1": "a b", "sentence2": f"c {i}", "label": label}
                for i, label in enumerate(["entailment", "not_entailment"] * 3)
            ],
        ),
        "alpaca": (
            "train",
            [{"instruction": "do", "input": "this", "output": f"done {i}"} for i in range(5)],
        ),
    }
    for task, (train, records) in rows.items():
        directory = tmp_path / task
        directory.mkdir()
        held_out = "heldout" if task == "alpaca" else "dev"
        for name, part in ((train, records[:3]), (held_out, records[3:])):
            (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (tmp_path / "wikitext2").mkdir()
    for name in ("train", "test"):
        extra = 7 if name == "train" else 0  # less than a window, or none
        words = " ".join(f"w{i}" for i in range(5 * MAX_TOKENS + extra))
        (tmp_path / "wikitext2" / f"{name}.raw").write_text(words)
    return tmp_path


def test_a_classification_row_predicts_its_one_answer_word(data):
    task = load_task("sst2", data, TOKENIZER)
    row = task.train[1]
    assert row["tokens"] == encode("Review: fine film 1\nSentiment: positive")
    assert row["labels"] == [IGNORE] * (len(row["tokens"]) - 1) + encode(" positive")
    assert task.answers == encode(" negative") + encode(" positive")
    assert task.metric == "accuracy"


def test_an_instruction_row_predicts_its_response_alone(data):
    row = load_task("alpaca", data, TOKENIZER).train[2]
    prompt = encode("Instruction: do this Response:")
    assert row["tokens"] == prompt + encode("done 2")
    assert row["labels"] == [IGNORE] * len(prompt) + encode("done 2")


def test_an_instruction_as_chat_comes_in_the_models_own_template(data):
    row = load_task("alpaca_chat", data, TOKENIZER).train[2]
    prompt = encode("<user> do this <assistant>")
    assert row["tokens"] == prompt + encode("done 2")
    assert row["labels"] == [IGNORE] * len(prompt) + encode("done 2")


def test_more_rows_a_step_are_the_same_rows_in_the_same_order(data):
    task = load_task("alpaca", data, TOKENIZER)
    task.train.extend(task.train * 7)
    small, large = task.batches(3, 4), task.batches(3, 8)
    for _ in range(3):
        rows = [row for _ in range(2) for row in next(small)["tokens"].tolist()]
        assert rows == next(large)["tokens"].tolist()


def test_text_is_cut_into_windows_without_overlap_and_all_of_it_counts(data):
    task = load_task("wikitext2", data, TOKENIZER)
    words = encode(" ".join(f"w{i}" for i in range(5 * MAX_TOKENS)))
    for rows in (task.train, task.held_out):
        assert [token for row in rows for token in row["tokens"]] == words
        assert all(row["labels"] == row["tokens"] for row in rows)


@pytest.mark.parametrize("name", TASKS)
def test_the_order_of_the_rows_depends_on_the_seed_alone(data, name):
    task = load_task(name, data, TOKENIZER)
    task.train.extend(task.train * 20)

    def start(seed):
        batches = task.batches(seed, BATCH_SIZE[name])
        return [next(batches) for _ in range(math.ceil(len(task.train) / 16) + 1)]

    for one, other in zip(start(0), start(0), strict=True):
        assert torch.equal(one["tokens"], other["tokens"])
        assert torch.equal(one["labels"], other["labels"])
    pairs = list(zip(start(0), start(1), strict=True))
    assert not all(torch.equal(one["tokens"], other["tokens"]) for one, other in pairs)


@pytest.mark.parametrize("name", TASKS)
def test_every_held_out_row_is_measured_once(data, name):
    task = load_task(name, data, TOKENIZER)
    measured = [
        [token for token in row if token]
        for batch in task.held_out_batches()
        for row in batch["tokens"].tolist()
    ]
    assert sorted(measured) == sorted(row["tokens"] for row in task.held_out)


@pytest.mark.parametrize("name", TASKS)
def test_few_rows_make_the_same_batches_in_every_epoch_in_another_order(data, name):
    task = load_task(name, data, TOKENIZER)
    task.train.extend(task.train * 20)
    batches = task.repeated_batches(1, 2, rows=13)

    def epoch():
        return [next(batches)["tokens"].tolist() for _ in range(6)]

    first, *others = [epoch() for _ in range(4)]
    assert all(sorted(other) == sorted(first) for other in others)
    assert any(other != first for other in others)


@pytest.mark.parametrize("seed", [0, 1])
def test_unseen_rows_are_those_that_no_batch_came_to(seed):
    rows = [{"tokens": [i], "labels": [i]} for i in range(20)]
    task = Task("rte", rows, rows[:2], [])
    batches = list(islice(task.batches(seed, 4), 3))
    seen = {int(token) for batch in batches for token in batch["tokens"].flatten()}
    unseen = task.unseen(seed, 12)
    assert {row["tokens"][0] for row in unseen.held_out} == set(range(20)) - seen
    assert (unseen.train, unseen.answers) == (rows, [])
