"""DPO over one backbone pass equals DPO with two models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchtune import rlhf
from torchtune.rlhf.loss import DPOLoss

from qst_tune.data.batches.loader import BatchLoader
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.training.monitor import Monitor
from qst_tune.training.preference import (
    PreferenceTask,
    answer_log_probabilities,
    build_preference_learning,
    collate_preferences,
)
from qst_tune.training.task import complete
from tests.support.configs import typed_config
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "tied"])
def model(request: pytest.FixtureRequest) -> QSTDecoder:
    torch.manual_seed(0)
    model = fresh_model(tied=request.param == "tied")
    randomize_(model.side)
    return model


def fresh_model(*, tied: bool) -> QSTDecoder:
    backbone = tiny_backbone(tied=tied)
    return qst_decoder(backbone, reduction_factor=TINY_REDUCTION, quantize_base=False)


def pair(lengths: tuple[int, int], prompt: int) -> dict[str, list[int]]:
    row = {}
    for name, length in zip(("chosen", "rejected"), lengths, strict=True):
        tokens = random_tokens(1, length)[0].tolist()
        row[f"{name}_input_ids"] = tokens
        row[f"{name}_labels"] = [-100] * prompt + tokens[prompt:]
    return row


def batch() -> dict[str, torch.Tensor]:
    return collate_preferences([pair((11, 7), 3), pair((5, 14), 2)], pad_id=0)


def two_model_loss(model: QSTDecoder, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """As torchtune's recipe: logits of the policy, then of the reference, its own log probs."""
    labels = F.pad(batch["labels"][:, :-1], (1, 0), value=-100)  # torchtune aligns them itself
    policy = rlhf.get_batch_log_probs(model(batch["tokens"]), labels)
    model.side.disabled = True
    with torch.no_grad():
        reference = rlhf.get_batch_log_probs(model(batch["tokens"]), labels)
    model.side.disabled = False
    return DPOLoss(beta=0.3)(*policy.chunk(2), *reference.chunk(2))


def gradients(model: QSTDecoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.side.named_parameters()}


def test_loss_and_gradient_equal_those_of_two_models(model: QSTDecoder) -> None:
    pairs = batch()
    expected, _, _ = two_model_loss(model, pairs)
    actual, count = PreferenceTask(DPOLoss(beta=0.3), CPU).loss(model, pairs)
    assert count == 2
    torch.testing.assert_close(actual, expected.sum(), rtol=2e-4, atol=0)  # fp32 logits up to 60
    wanted = gradients(model, expected.sum())
    torch.testing.assert_close(gradients(model, actual), wanted, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("side."))


def test_start_as_the_reference_equals_that_of_two_models(model: QSTDecoder) -> None:
    """The policy moves on; the reference stays what it was, in the backbone's only pass."""
    pairs, names = batch(), list(model.state_dict())
    labels = F.pad(pairs["labels"][:, :-1], (1, 0), value=-100)
    with torch.no_grad():
        reference = rlhf.get_batch_log_probs(model(pairs["tokens"]), labels)
    model.keep_reference()
    randomize_(model.side)
    policy = rlhf.get_batch_log_probs(model(pairs["tokens"]), labels)
    expected, _, _ = DPOLoss(beta=0.3)(*policy.chunk(2), *reference.chunk(2))
    wanted = gradients(model, expected.sum())
    passes = []
    model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    actual, _ = PreferenceTask(DPOLoss(beta=0.3), CPU).loss(model, pairs)
    assert len(passes) == 1
    torch.testing.assert_close(actual, expected.sum(), rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(gradients(model, actual), wanted, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == names, "the copy is not saved"
    assert not any(p.requires_grad for p in model.reference_side.parameters())


def test_model_with_a_fresh_side_network_is_its_own_reference() -> None:
    loss, count = PreferenceTask(DPOLoss(), CPU).loss(fresh_model(tied=True), batch())
    torch.testing.assert_close(loss / count, torch.tensor(2.0).log(), rtol=1e-6, atol=0)


def test_evaluation_counts_every_pair_once(model: QSTDecoder) -> None:
    batches = [batch(), collate_preferences([pair((9, 9), 4)], pad_id=0)]
    results = [two_model_loss(model, b) for b in batches]
    losses, chosen, rejected = (torch.cat(parts).detach() for parts in zip(*results, strict=True))
    task = PreferenceTask(DPOLoss(beta=0.3), CPU)
    model.train()
    figures = complete(task.evaluating(model, batches))
    assert model.training
    assert figures["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert figures["reward_margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-3)
    assert figures["reward_accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert task.monitor == Monitor("val_loss")


def test_row_without_a_label_has_log_probability_zero() -> None:
    hidden, labels = torch.randn(2, 3, 4), torch.tensor([[1, -100, 2], [-100, -100, -100]])
    head = torch.nn.Linear(4, 5, bias=False).requires_grad_(False)
    log_probabilities = head(hidden).log_softmax(-1)
    first = log_probabilities[0, 0, 1] + log_probabilities[0, 2, 2]
    expected = torch.stack([first, torch.tensor(0.0)])
    torch.testing.assert_close(answer_log_probabilities(hidden, labels, head), expected)


class Tokenizer:
    pad_id, max_seq_len = 0, None


class Pairs(list):
    def __init__(self, tokenizer: Any, kind: str) -> None:
        long = TINY["max_seq_len"] + 1
        rows = {"pairs": pair((9, 9), 4), "long": pair((9, long), 4), "texts": {"tokens": [1, 2]}}
        super().__init__([rows[kind]] * 8)


def build(model: QSTDecoder, kind: str = "pairs", loss: str = "torchtune.rlhf.loss.DPOLoss") -> Any:
    cfg = typed_config(
        {
            "dataset": {"_component_": "tests.training.test_preference.Pairs", "kind": kind},
            "loss": {"_component_": loss},
            "batch_size": 4,
            "epochs": 1,
        }
    )
    return build_preference_learning(cfg, Tokenizer(), model, seed=0, device=CPU)


def test_task_is_built_from_a_config(model: QSTDecoder) -> None:
    task, data = build(model)
    assert isinstance(task.loss_function, DPOLoss)
    assert isinstance(data.train, BatchLoader)
    (first, _) = data.train
    assert first["tokens"].shape == (8, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "texts"}, "^dataset: .*: rows need a chosen and a rejected answer"),
        ({"kind": "long"}, "^dataset: row 0 of .* a row of 65 tokens is longer than the model's"),
        ({"loss": "torch.nn.CrossEntropyLoss"}, "^loss: torch.nn.CrossEntropyLoss does not learn"),
    ],
)
def test_what_cannot_be_learnt_from_is_reported(
    settings: dict[str, str], message: str, model: QSTDecoder
) -> None:
    with pytest.raises(UserError, match=message):
        build(model, **settings)
