"""A side network over a sequence classifier of transformers, whose own head goes on training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qst_tune import QSTForCausalLM, QSTForSequenceClassification, SideConfig, get_qst_model
from qst_tune.errors import UserError
from qst_tune.results.loading import load_directory
from tests.support.model_types import saved_models
from tests.support.numbers import random_tokens, randomize_

TYPES = ("llama", "qwen3", "gemma2", "opt", "mixtral")
SMALL = SideConfig(reduction_factor=4, rank=8)
CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models(tmp_path_factory.mktemp("models"), TYPES)


def load(directory: Path, num_labels: int = 3) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=num_labels, dtype=torch.float32, pad_token_id=0
    )


def padded_batch() -> dict[str, torch.Tensor]:
    tokens = random_tokens(batch=3, length=9, vocab_size=250).clamp(min=1)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_it_starts_at_the_models_logits_and_losses(name, directories):
    model, batch = load(directories[name]), padded_batch()
    labels = torch.tensor([2, 0, 1])
    want = model(**batch, labels=labels)
    got = get_qst_model(model, SMALL)(**batch, labels=labels)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_steps_lower_the_loss_and_train_side_network_and_head_alone(num_labels, directories):
    tuned = get_qst_model(load(directories["llama"], num_labels), SMALL)
    frozen = {n: p.clone() for n, p in tuned.named_parameters() if not p.requires_grad}
    batch = padded_batch()
    head = tuned.model.side.score.weight.clone()
    labels = torch.tensor([2, 0, 1]) if num_labels > 1 else torch.tensor([2.0, 0.0, 1.0])
    optimizer = torch.optim.Adam((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = tuned.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    now = dict(tuned.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    assert not torch.equal(tuned.model.side.score.weight, head)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@torch.no_grad()
def test_a_saved_classifier_opens_everywhere_with_the_same_logits(quantize, directories, tmp_path):
    tuned = get_qst_model(load(directories["llama"]), SMALL, quantize=quantize)
    randomize_(tuned.model.side)
    tuned.save_pretrained(tmp_path)
    batch = padded_batch()
    want = tuned(**batch).logits
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(opened, QSTForSequenceClassification)
    assert opened.config.num_labels == 3
    over_model = QSTForSequenceClassification.from_pretrained(
        tmp_path, backbone=load(directories["llama"])
    )
    in_recipes = load_directory(
        tmp_path,
        directories["llama"],
        dtype=torch.float32,
        device=torch.device("cpu"),
        use="classes",
    ).model
    assert torch.equal(opened(**batch).logits, want)
    assert torch.equal(over_model(**batch).logits, want)
    recipes_logits = in_recipes(batch["input_ids"], padding_mask=batch["attention_mask"].bool())
    assert torch.equal(recipes_logits, want)
    with pytest.raises(UserError, match="is a classifier, which writes no text"):
        QSTForCausalLM.from_pretrained(tmp_path)


def test_a_directory_cannot_have_foreign_code_called_as_its_backbone(directories, tmp_path):
    tuned = get_qst_model(load(directories["llama"]), SMALL)
    tuned.save_pretrained(tmp_path)
    text = (tmp_path / "qst_config.json").read_text()
    for foreign in ("os.system", "torchtune.models.llama2.partial", "qst_tune.models.qst.inspect"):
        changed = text.replace("qst_tune.models.backbone_from_hf", foreign)
        (tmp_path / "qst_config.json").write_text(changed)
        with pytest.raises(UserError, match=f"names the model '{foreign}'"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_head_that_is_no_plain_layer_is_refused(directories):
    model = load(directories["llama"])
    model.score = torch.nn.Linear(64, 3)
    with pytest.raises(UserError, match="must be linear, without bias"):
        get_qst_model(model, SMALL)
