"""From a config to the task of language modelling, which all methods share."""

from typing import Any

import torch
from omegaconf import DictConfig
from torchtune.modules import TransformerDecoder

from qst_tune.training.loss import build_loss, connect_loss
from qst_tune.training.next_token import NextTokenTask
from qst_tune.training.row_kind import TEXT_KEY, check_rows
from qst_tune.training.trainer_setup import TrainingData, build_data, text_collate
from qst_tune.training.vocabulary import vocabulary_of


def build_language_modelling(
    cfg: DictConfig, tokenizer: Any, model: TransformerDecoder, *, seed: int, device: torch.device
) -> tuple[NextTokenTask, TrainingData]:
    """Build the task of predicting each next token, and its data; connects loss and model."""
    loss = build_loss(cfg.loss)
    vocabulary = vocabulary_of(model, tokenizer, loss.ignore_index)
    limits: dict[str, Any] = {"max_seq_len": model.max_seq_len}
    collate = text_collate(cfg, vocabulary, **limits)
    data = build_data(cfg, tokenizer, collate, seed=seed, vocabulary=vocabulary, **limits)
    check_rows(data, TEXT_KEY)
    connect_loss(loss, model)
    return NextTokenTask(loss, device), data
