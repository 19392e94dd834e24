"""Parts of a batch: their gradients add up to those of the whole."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.rlhf.loss import DPOLoss

from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.loss import connect_loss
from qst_tune.training import task as module
from qst_tune.training.language_modelling import NextTokenTask
from qst_tune.training.preference import PreferenceTask
from qst_tune.training.task import on_device, parts_of
from tests.support.numbers import random_tokens
from tests.support.side_networks import FP32, tiny_model

CPU = torch.device("cpu")


def batch_of(rows: int) -> dict[str, Any]:
    tokens = random_tokens(batch=rows, length=10)
    labels = torch.where(torch.rand(tokens.shape) < 0.6, tokens, -100)
    return {"tokens": tokens, "labels": labels, "input_pos": torch.arange(10)}


def tasks() -> dict[str, Any]:
    return {
        "text": NextTokenTask(LinearCrossEntropyLoss(), CPU),
        "pairs": PreferenceTask(DPOLoss(), CPU),
    }


def summed(task: Any, model: Any, batches: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = torch.zeros(2)
    for batch in batches:
        loss, count = task.loss(model, batch)
        loss.backward()
        total += torch.stack([loss.detach(), count.float()])
    return total, {name: p.grad.clone() for name, p in model.side.named_parameters()}


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_parts_add_up_to_the_batch(kind: str, rows_at_once: int, monkeypatch: Any) -> None:
    exact = {"dtype": torch.float64, "quantize_base": False}
    model, task = tiny_model(lora_layers=2, lora_rank=2, **exact).double(), tasks()[kind]
    if kind == "text":
        connect_loss(task.loss_function, model)
    batch = batch_of(6)
    if kind == "pairs":
        del batch["input_pos"]
    expected = summed(task, model, [batch])
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 10 * rows_at_once)
    parts = list(parts_of(task, model, batch))
    each = max(1, rows_at_once // task.rows_an_example) * task.rows_an_example
    assert [len(part["tokens"]) for part in parts[:-1]] == [each] * (len(parts) - 1)
    assert sum(len(part["tokens"]) for part in parts) == 6
    found = summed(task, model, parts)
    torch.testing.assert_close(found[0], expected[0], **FP32)
    for name, gradient in expected[1].items():
        size = gradient.abs().max()  # the losses of tokens are fp32
        torch.testing.assert_close(found[1][name] / size, gradient / size, rtol=0, atol=1e-5)


def test_a_batch_is_whole_without_lora_and_where_rows_cannot_be_cut(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 10)
    task, batch = tasks()["text"], batch_of(4)
    assert list(parts_of(task, tiny_model(), batch)) == [batch]
    assert list(parts_of(task, SimpleNamespace(), batch)) == [batch]
    block = create_block_mask(lambda b, h, q, k: q >= k, 4, None, 10, 10, device="cpu")
    packed = {**batch, "mask": block}
    assert list(parts_of(task, tiny_model(lora_layers=1), packed)) == [packed]
    assert len(list(parts_of(task, tiny_model(lora_layers=1), batch))) == 4


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_is_put_on_the_device_from_wherever_it_is(name: str) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device(name)
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, device="cpu")
    batch = {"tokens": random_tokens(2, 9), "there": torch.ones(3, device=device), "mask": mask}
    moved = on_device(batch, device)
    assert {value.device.type for value in (moved["tokens"], moved["there"])} == {name}
    assert torch.equal(moved["tokens"].cpu(), batch["tokens"])
    assert torch.equal(moved["mask"].to_dense().cpu(), mask.to_dense())
    assert batch["tokens"].device == CPU
