"""The tasks, from local files: rows of token ids, of which some are to be predicted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtune.data import padded_collate_sft

IGNORE = -100
MAX_TOKENS = 256
# Every task is cut to as much as two CPU cores can do in minutes.
MAX_EVALUATED = {"sst2": 872, "rte": 277, "wikitext2": 80, "alpaca": 160, "alpaca_chat": 160}
BATCH_SIZE = {"sst2": 16, "rte": 8, "wikitext2": 4, "alpaca": 4, "alpaca_chat": 4}

Row = dict[str, list[int]]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Task:
    """Rows to learn from and rows to be measured on.

    Args:
        name (str): as on the command line.
        train (list[Row]): ``tokens`` and ``labels``, -100 where there is nothing to predict.
        held_out (list[Row]): likewise.
        answers (list[int]): ids of the words to choose from; empty where all words count.
    """

    name: str
    train: list[Row]
    held_out: list[Row]
    answers: list[int]

    @property
    def metric(self) -> str:
        """What the held-out rows are measured by."""
        if self.answers:
            return "accuracy"
        return "perplexity" if self.name == "wikitext2" else "loss"

    def batches(self, seed: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield training batches without end; the order of rows depends on the seed alone.

        Args:
            seed (int): of the shuffling.
            batch_size (int): rows a batch.

        Yields:
            dict[str, torch.Tensor]: ``tokens`` and ``labels``, ``[B, T]``.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield collate([self.train[i] for i in order[start : start + batch_size]])

    def held_out_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the held-out rows once, rows of like length together.

        Yields:
            dict[str, torch.Tensor]: ``tokens`` and ``labels``, ``[B, T]``.
        """
        rows = sorted(self.held_out, key=lambda row: len(row["tokens"]))
        for start in range(0, len(rows), 16):
            yield collate(rows[start : start + 16])


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Pad on the right; the padding has no label and comes after all that can attend to it.

    Args:
        rows (list[Row]): of any lengths.

    Returns:
        dict[str, torch.Tensor]: ``tokens`` and ``labels``, ``[B, T]``.
    """
    batch: dict[str, torch.Tensor] = padded_collate_sft(rows, padding_idx=0, ignore_idx=IGNORE)
    return batch


def folder_of(name: str, data: Path) -> Path:
    """Tell where a task's rows are.

    Args:
        name (str): a key of :data:`TASKS`.
        data (Path): holds a folder for each dataset.

    Returns:
        Path: of its dataset.
    """
    return data / name.removesuffix("_chat")


def load_task(name: str, data: Path, tokenizer: Any) -> Task:
    """Read a task.

    Args:
        name (str): a key of :data:`TASKS`.
        data (Path): holds a folder for each dataset.
        tokenizer (Any): the model's, of transformers.

    Returns:
        Task: its held-out rows cut to :data:`MAX_EVALUATED`.
    """
    train, held_out, answers = TASKS[name](folder_of(name, data), tokenizer)
    return Task(name, train, held_out[: MAX_EVALUATED[name]], answers)


def _sst2(folder: Path, tokenizer: Any) -> tuple[list[Row], list[Row], list[int]]:
    encode = _encoder(tokenizer)
    words = {0: " negative", 1: " positive"}

    def row(record: dict[str, Any]) -> Row:
        text = f"Review: {record['sentence'].strip()}\nSentiment:"
        return _with_answer(encode(text), encode(words[record["label"]]))

    train = [row(r) for r in _read(folder / "train_sentences.jsonl")]
    held_out = [row(r) for r in _read(folder / "dev.jsonl")]
    return train, held_out, [encode(word)[0] for word in words.values()]


def _rte(folder: Path, tokenizer: Any) -> tuple[list[Row], list[Row], list[int]]:
    encode = _encoder(tokenizer)
    words = {"entailment": " yes", "not_entailment": " no"}

    def row(record: dict[str, Any]) -> Row:
        premise, hypothesis = record["sentence1"].strip(), record["sentence2"].strip()
        text = f"{premise}\nQuestion: does it follow that {hypothesis}\nAnswer:"
        return _with_answer(encode(text), encode(words[record["label"]]))

    train = [row(r) for r in _read(folder / "train.jsonl")]
    held_out = [row(r) for r in _read(folder / "dev.jsonl")]
    return train, held_out, [encode(word)[0] for word in words.values()]


def _wikitext2(folder: Path, tokenizer: Any) -> tuple[list[Row], list[Row], list[int]]:
    encode = _encoder(tokenizer)

    def rows(path: Path) -> list[Row]:
        ids = encode(path.read_text())
        windows = [ids[i : i + MAX_TOKENS] for i in range(0, len(ids) - MAX_TOKENS + 1, MAX_TOKENS)]
        return [{"tokens": window, "labels": window} for window in windows]

    return rows(folder / "train.raw"), rows(folder / "test.raw"), []


def _alpaca(folder: Path, tokenizer: Any) -> tuple[list[Row], list[Row], list[int]]:
    encode = _encoder(tokenizer)

    def row(instruction: str, output: str) -> Row:
        prompt = encode(f"Instruction: {instruction}\nResponse:")
        return _with_answer(prompt, encode(" " + output))

    return _instructions(folder, row)


def _alpaca_chat(folder: Path, tokenizer: Any) -> tuple[list[Row], list[Row], list[int]]:
    """The same rows in the model's own chat template, up to the end of the answer's text."""
    encode = _encoder(tokenizer)

    def row(instruction: str, output: str) -> Row:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}], tokenize=False, add_generation_prompt=True
        )
        return _with_answer(encode(prompt), encode(output))

    return _instructions(folder, row)


def _instructions(
    folder: Path, row: Callable[[str, str], Row]
) -> tuple[list[Row], list[Row], list[int]]:
    def rows(name: str) -> list[Row]:
        return [
            row(r["instruction"] + (f"\n{r['input']}" if r["input"] else ""), r["output"])
            for r in _read(folder / name)
        ]

    return rows("train.jsonl"), rows("heldout.jsonl"), []


TASKS: dict[str, Callable[[Path, Any], tuple[list[Row], list[Row], list[int]]]] = {
    "sst2": _sst2,
    "rte": _rte,
    "wikitext2": _wikitext2,
    "alpaca": _alpaca,
    "alpaca_chat": _alpaca_chat,
}


def _encoder(tokenizer: Any) -> Encode:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _with_answer(prompt: list[int], answer: list[int]) -> Row:
    """A row of at most MAX_TOKENS: a long prompt loses its beginning, a long answer its end."""
    answer = answer[: MAX_TOKENS // 2]
    prompt = prompt[-(MAX_TOKENS - len(answer)) :]
    return {"tokens": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def _read(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(), which also splits at separators that stand within JSON's strings.
    return [json.loads(line) for line in path.read_text().split("\n") if line]
