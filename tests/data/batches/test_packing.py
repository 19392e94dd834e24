"""Packs learn what their rows learn: the loss and gradients of transformers, row by row."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torchtune.data import padded_collate_packed
from torchtune.datasets import ConcatDataset, PackedDataset

from qst_tune.data.batches.datasets import build_dataset
from qst_tune.data.batches.packing import is_packed, split_off_packing
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.loss import connect_loss, next_token_loss
from tests.support.numbers import TINY, TINY_REDUCTION, randomize_, tiny_backbone

LENGTHS = [5, 3, 7, 2, 30, 1, 6]  # of a pack of 8: one row spans several, one has no label
LENGTH = 8


class Rows:
    """Rows of different tokens; the first two of each have no label."""

    def __init__(self, tokenizer: Any = None, *, packed: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.randint(1, TINY["vocab_size"], (n,), generator=generator).tolist()
            for n in LENGTHS
        ]
        self.rows = [{"tokens": r, "labels": [-100, -100, *r[2:]][: len(r)]} for r in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class Tokenizer:
    pad_id, max_seq_len = 0, LENGTH


def own_packs(tokenizer: Any = None, *, split: bool, max_packs: int | None = None) -> PackedDataset:
    rows = Rows()
    if not split:
        rows.rows = [row for row in rows.rows if len(row["tokens"]) <= LENGTH]
    return PackedDataset(rows, max_seq_len=LENGTH, split_across_pack=split, max_packs=max_packs)


class OwnPacks(PackedDataset):
    """A user's class, of whose packs only their form is known."""

    def __init__(self, tokenizer: Any = None, *, without: str = "") -> None:
        self.without = without
        packs = own_packs(split=False)
        super().__init__(packs.ds, max_seq_len=LENGTH)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {k: v for k, v in super().__getitem__(index).items() if k != self.without}


def build(name: str, **settings: Any) -> Any:
    block = {"_component_": f"tests.data.batches.test_packing.{name}", **settings}
    return build_dataset(OmegaConf.create(block), "dataset", Tokenizer())[0]


def pack_rows(*, split: bool) -> Any:
    name = "torchtune.datasets.text_completion_dataset"
    block = {"_component_": name, "packed": True, "split_across_pack": split}
    packing = split_off_packing(OmegaConf.create(block))
    assert packing is not None
    return packing.apply(own_packs(split=split).ds, Tokenizer(), "dataset")


def model_and_loss() -> Any:
    torch.manual_seed(0)
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, quantize_base=False)
    randomize_(model.side)
    loss = LinearCrossEntropyLoss()
    connect_loss(loss, model)
    return model, loss


def row_by_row(model: Any, rows: list[dict[str, list[int]]], *, split: bool) -> torch.Tensor:
    """Sum of the losses of each row, or of each piece of it, run alone; no pack knows of it."""
    total = torch.zeros(())
    filled = 0
    for row in rows:
        tokens, labels = row["tokens"], [*row["labels"][1:], -100]
        while tokens:
            room = LENGTH - filled if split else LENGTH
            piece, target = tokens[:room], torch.tensor(labels[:room])
            logits = model.output(model(torch.tensor([piece])))[0]
            total = total + F.cross_entropy(logits, target, reduction="sum")
            tokens, labels = tokens[room:], labels[room:]
            filled = (filled + len(piece)) % LENGTH
    return total


def grads(model: Any, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.side.named_parameters()}


@pytest.mark.parametrize(
    ("make", "split"),
    [
        (lambda: pack_rows(split=True), True),
        (lambda: pack_rows(split=False), False),
        (lambda: build("own_packs", split=True), True),
        (lambda: build("own_packs", split=False), False),
        (lambda: build("OwnPacks"), False),
    ],
    ids=["ours, split", "ours", "user's, split", "user's", "user's class"],
)
def test_loss_and_gradient_are_those_of_the_rows_alone(make: Any, split: bool) -> None:
    packs = make()
    assert is_packed(packs)
    rows = own_packs(split=split).ds.rows
    model, loss = model_and_loss()
    batch = padded_collate_packed([packs[i] for i in range(len(packs))])
    mean, count = next_token_loss(model, loss, batch)
    assert count == sum(label != -100 for row in rows for label in row["labels"][1:])
    actual = grads(model, mean * count)
    expected = row_by_row(model, rows, split=split)
    # fp32, attention over 8 masked columns instead of a row's own.
    torch.testing.assert_close(mean * count, expected, rtol=1e-5, atol=1e-5)
    wanted = grads(model, expected)
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


def test_split_packs_lose_no_token_and_number_each_piece_from_zero() -> None:
    packs = pack_rows(split=True)
    rows = own_packs(split=True).ds.rows
    tokens = torch.cat([packs[i]["tokens"] for i in range(len(packs))]).tolist()
    assert tokens[: sum(LENGTHS)] == [token for row in rows for token in row["tokens"]]
    for pack in (packs[i] for i in range(len(packs))):
        expected = [position for n in pack["seq_lens"].tolist() for position in range(n)]
        assert pack["input_pos"].tolist() == expected


def test_concatenation_of_packs_is_packed() -> None:
    assert not is_packed(Rows())
    name = "tests.data.batches.test_packing."
    own = {"_component_": f"{name}own_packs", "split": False}
    both, _ = build_dataset(OmegaConf.create([own, own]), "dataset", Tokenizer())
    assert isinstance(both, ConcatDataset)
    assert is_packed(both)
    with pytest.raises(UserError, match=r"^dataset: packed must be the same for all datasets"):
        build_dataset(OmegaConf.create([own, {"_component_": f"{name}Rows"}]), "dataset", None)


@pytest.mark.parametrize("row", [{"chosen_input_ids": [1]}, {"tokens": [1], "labels": 0}])
def test_rows_that_are_no_texts_are_not_packed(row: dict[str, Any]) -> None:
    name = "torchtune.datasets.text_completion_dataset"
    packing = split_off_packing(OmegaConf.create({"_component_": name, "packed": True}))
    assert packing is not None
    with pytest.raises(UserError, match=r"^dataset: packed=True is for rows of text"):
        packing.apply([row], Tokenizer(), "dataset")


def test_max_packs_of_a_users_packs_is_kept() -> None:
    assert len(build("own_packs", split=True, max_packs=3)) == 3


def test_pack_of_another_form_is_named() -> None:
    with pytest.raises(UserError, match=r"^dataset: pack 0 has no seq_lens, which torchtune\.data"):
        build("OwnPacks", without="seq_lens")[0]
