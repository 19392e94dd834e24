"""The task of preferring one answer to another: direct preference optimisation (DPO).

Notation: B pairs, T tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_dpo
from torchtune.modules import TransformerDecoder

from qst_tune.config.components import instantiate
from qst_tune.config.schema import StepConfig, TrainingConfig
from qst_tune.data.batches.collate import align_labels
from qst_tune.data.batches.loader import Batch
from qst_tune.data.batches.training_data import (
    PAIR_KEY,
    TrainingData,
    build_data,
    check_rows,
)
from qst_tune.distributed.processes import sum_or_fail
from qst_tune.distributed.sharding import take_part
from qst_tune.errors import UserError
from qst_tune.modules.loss import linear_cross_entropy
from qst_tune.modules.model_limits import check_length, limits_of
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.monitor import Monitor
from qst_tune.training.task import Passes, visit


@dataclass(frozen=True)
class PreferenceTask:
    r"""Loss of one pair of answers a row; see :class:`~qst_tune.training.task.Task`.

    .. math::
        -\log \sigma\Big(\beta \log \frac{\pi(c)}{\pi_0(c)}
            - \beta \log \frac{\pi(r)}{\pi_0(r)}\Big)

    for the chosen answer c and the rejected one r. The policy :math:`\pi` is the model with its
    side network, the reference :math:`\pi_0` the backbone alone or with the side network that the
    run started from: one pass through the backbone gives both, where others keep a second model or
    run it twice.

    Source: DPO (https://arxiv.org/abs/2305.18290). The loss is torchtune's; any of
    ``torchtune.rlhf.loss`` that takes the four log probabilities will do.

    ``loss_function`` turns log probabilities ``[B]`` of the policy (chosen, rejected) and of the
    reference (chosen, rejected) into losses and two rewards, ``[B]`` each.
    """

    loss_function: Any
    device: torch.device

    monitor: ClassVar[Monitor] = Monitor("val_loss")
    rows_an_example: ClassVar[int] = 2

    def loss(self, model: TransformerDecoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses, in nats, and the number of pairs B.

        ``tokens`` and ``labels`` of the batch are ``[2B, T]``, the chosen answers first.
        """
        losses, _ = self._losses_and_margins(model, batch)
        return losses.sum(), torch.tensor(len(losses), device=losses.device)

    def take_part(self, model: TransformerDecoder) -> None:
        """Run a sharded model on one token, as the processes do that have a batch."""
        take_part(model, self.device, model.with_reference)

    def evaluating(
        self, model: TransformerDecoder, batches: Iterable[Batch]
    ) -> Passes[dict[str, float]]:
        """Judge every pair once. Collective: all ranks call it and get the same figures.

        ``reward_accuracy`` is the share of pairs whose chosen answer has the higher reward,
        ``reward_margin`` by how much on average, in nats.
        """
        # The number of pairs, and their sums of losses, wins and margins.
        total = torch.zeros(4, device=self.device)

        def add(batch: Batch) -> None:
            losses, margins = self._losses_and_margins(model, batch)
            wins = (margins > 0).float()
            total.add_(torch.stack([torch.ones_like(losses), losses, wins, margins]).sum(1))

        error = yield from visit(model, batches, self.device, add, model.with_reference)
        count, loss, wins, margin = sum_or_fail(total, error).tolist()
        return {
            "val_loss": loss / count,
            "reward_accuracy": wins / count,
            "reward_margin": margin / count,
        }

    def _losses_and_margins(
        self, model: TransformerDecoder, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_length(batch["tokens"], model.max_seq_len)
        labels = batch["labels"]
        policy, reference = model.with_reference(batch["tokens"])
        log_probabilities = [
            *answer_log_probabilities(policy, labels, model.output).chunk(2),
            *answer_log_probabilities(reference, labels, model.output).chunk(2),
        ]
        losses, chosen_rewards, rejected_rewards = self.loss_function(*log_probabilities)
        return losses, chosen_rewards - rejected_rewards


def answer_log_probabilities(hidden: torch.Tensor, labels: torch.Tensor, head: Any) -> torch.Tensor:
    """Sum the log probabilities of each row's labels, never holding the logits.

    From the LM head's input ``[B, T, D]``, in which it is differentiable, and aligned labels ``[B,
    T]`` to nats ``[B]``, fp32.
    """
    batch_size, length = labels.shape
    rows, columns = (labels != CROSS_ENTROPY_IGNORE_IDX).nonzero().unbind(-1)
    tokens = rows * length + columns
    losses = linear_cross_entropy(hidden.flatten(0, 1), labels.flatten(), head, rows=tokens)
    return -losses.new_zeros(batch_size).index_add(0, rows, losses)


def collate_preferences(rows: list[Any], *, pad_id: int) -> Batch:
    """Make ``tokens`` and aligned ``labels`` ``[2B, T]`` of pairs, the chosen answers first."""
    tokens, labels = padded_collate_dpo(rows, padding_idx=pad_id)
    return {"tokens": tokens, "labels": align_labels(labels)}


def build_preference_learning(
    cfg: TrainingConfig, tokenizer: Any, model: QSTModel, *, seed: int, device: torch.device
) -> tuple[PreferenceTask, TrainingData]:
    """Build the task and its data."""
    limits = limits_of(model, tokenizer)
    collate = partial(collate_preferences, pad_id=limits.pad_id)
    loss = instantiate(cfg.loss, "loss")
    check_loss(loss, cfg.loss._component_)
    data = build_data(cfg, limits, collate, seed=seed)
    check_rows(data, PAIR_KEY)
    return PreferenceTask(loss, device), data


def reference_of(cfg: StepConfig) -> str:
    """Return what the policy is compared with: "start" (``side_network``) or "backbone"."""
    chosen = cfg.reference or ("start" if cfg.side_network else "backbone")
    if chosen == "start" and not cfg.side_network:
        raise UserError("reference=start needs side_network, the result that the run starts from")
    return str(chosen)


def check_loss(loss: Any, name: str) -> None:
    """Refuse a loss that does not take the four log probabilities of a pair."""
    try:
        losses, _, _ = loss(*torch.zeros(4, 1))
        assert losses.shape == (1,)
    except Exception as error:  # any loss may be named here, and each has its own way to fail
        raise UserError(
            f"loss: {name} does not learn from pairs: use torchtune.rlhf.loss.DPOLoss or another "
            "that takes four log probabilities"
        ) from error
