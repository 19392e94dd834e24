from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from qst_tune.training.cli import instantiate
from qst_tune.training.language_modelling import build_language_modelling
from qst_tune.training.model_setup import build_on_meta
from qst_tune.training.qst_method import load_qst
from tests.checkpoints import finetune_config

CPU = torch.device("cpu")


def test_the_task_is_the_cross_entropy_of_each_labelled_token_given_those_before(
    tmp_path: Path,
) -> None:
    cfg = OmegaConf.create(finetune_config(tmp_path))
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    model = build_on_meta(cfg, torch.float32)
    task, data = build_language_modelling(cfg, tokenizer, model, seed=0, device=CPU)
    load_qst(model, cfg, dtype=torch.float32, device=CPU)
    batch = next(iter(data.train.batches(0, start=0)))
    total, count = task.loss(model, batch)
    labels = batch["labels"]
    hidden = model(batch["tokens"])  # connected to the loss, it stops before the head
    assert hidden.shape == (*batch["tokens"].shape, model.tok_embeddings.embedding_dim)
    logits = model.output(hidden)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert count == (labels != -100).sum()
    learnt = labels[:, :-1] != -100
    assert torch.equal(labels[:, :-1][learnt], batch["tokens"][:, 1:][learnt])
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
