"""One run of the study: train a method on a task, then measure it on the validation rows."""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.methods import CPU
from benchmarks.study.learners import Learner, fast_decoding
from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import IGNORE, Task
from qst_tune.data.batches.collate import LENGTH_MULTIPLE
from qst_tune.modules.backbone_formats import quantization_of
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.methods import scale_rates

WARMUP = 10
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Run:
    """What one line of the results was measured with.

    Args:
        task (str): name.
        method (str): name; "untuned" for the model in 4 bits as it is.
        rate (float): peak learning rate.
        steps (int): optimizer steps.
        seed (int): of the trained weights and of the order of the rows.
        batch_size (int): rows a step.
        rows (int | None): how many rows of the training set come again and again; None: all, which
            are more than the steps need.
    """

    task: str
    method: str
    rate: float
    steps: int
    seed: int
    batch_size: int
    rows: int | None = None

    @property
    def steps_an_epoch(self) -> int:
        """Steps until rows come again; all, where none does."""
        return max(1, self.rows // self.batch_size if self.rows else self.steps)

    def batches(self, task: Task) -> Iterator[dict[str, torch.Tensor]]:
        """Return the training batches, without end."""
        if self.rows:
            return task.repeated_batches(self.seed, self.batch_size, self.rows)
        return task.batches(self.seed, self.batch_size)


@dataclass(frozen=True)
class Place:
    """Where runs happen, which changes no result but for rounding.

    Args:
        checkpoint (Path): directory of SmolLM2-135M-Instruct.
        device (torch.device): of model and batches.
        states (Path | None): directory where the states of frozen layers are kept.
    """

    checkpoint: Path
    device: torch.device = CPU
    states: Path | None = None


def execute(run: Run, task: Task, place: Place, unseen_after: int | None = None) -> dict[str, Any]:
    """Train and measure.

    Args:
        run (Run): what to do; 0 steps measure the method's model before training.
        task (Task): its rows.
        place (Place): where.
        unseen_after (int | None): also measure the training rows that come after so many in the
            run's first epoch; at least as many as it trains on.

    Returns:
        dict[str, Any]: the run, ``held_out`` (the task's metric), ``held_out_loss`` and
        ``train_loss`` (mean of the last quarter) in nats a label, ``tokens``, ``trained``
        parameters, the ``device``, whether ``states`` were kept, ``seconds`` of training, an entry
        an epoch, and the loss ``curve``; ``unseen``, the metric of the rows after
        ``unseen_after``, where it is given.
    """
    torch.manual_seed(run.seed)
    learner = METHODS[run.method].build(place.checkpoint, place.device)
    if isinstance(learner.model, QSTModel):
        learner.model.side.recompute = False  # the same numbers sooner; costs.py measures both
    if place.states and can_keep_states(learner.model):
        directory = place.states / place.checkpoint.name
        learner.model.hidden_state_cache = _kept_states(learner.model, directory)
    tokens, curve, times = 0, [], [time.perf_counter()]
    with fast_decoding():
        for loss, size in _train(learner, run.batches(task), run):
            curve.append(loss)
            tokens += size
            times.append(time.perf_counter())
    last = curve[-max(1, len(curve) // 4) :]
    with fast_decoding():
        measured = evaluate(learner, task)
        if unseen_after is not None:
            unseen = evaluate(learner, task.unseen(run.seed, unseen_after))["held_out"]
            measured |= {"unseen": unseen, "unseen_after": unseen_after}
    ends = [*times[: -1 : run.steps_an_epoch], times[-1]]
    return {
        **asdict(run),
        **measured,
        "train_loss": sum(last) / len(last) if last else None,
        "tokens": tokens,
        "trained": learner.num_trained,
        "device": place.device.type,
        "states": getattr(learner.model, "hidden_state_cache", None) is not None,
        "seconds": [round(end - start, 2) for start, end in pairwise(ends)],
        "curve": [round(loss, 4) for loss in curve],
    }


def can_keep_states(model: Any) -> bool:
    """Tell whether a model has frozen layers before the first that trains.

    Args:
        model (Any): a torchtune decoder.

    Returns:
        bool: True for ours, except with LoRA in all layers.
    """
    return isinstance(model, QSTModel) and (model.side.lora is None or model.side.lora.first > 0)


def _kept_states(model: QSTModel, directory: Path) -> HiddenStateCache:
    """Variants of the side network share what they read of the same weights and layers."""
    layers: Any = model.layers
    what = f"{quantization_of(layers)}, output of {model.side.layers}"
    if model.side.lora is not None:
        what += f", frozen below {model.side.lora.first}"
    return HiddenStateCache(directory / re.sub(r"\W+", "_", what).strip("_"))


def _train(
    learner: Learner, batches: Iterator[dict[str, torch.Tensor]], run: Run
) -> Iterator[tuple[float, int]]:
    """AdamW, warm-up, then linear decay to 0; yields each step's loss and number of tokens."""
    optimizer = optimizer_of(learner, run.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, max(0.0, 1 - step / max(1, run.steps)))
    )
    for _ in tqdm(
        range(run.steps), desc=f"{run.task} {run.method} seed {run.seed}", mininterval=10
    ):
        batch = next(batches)
        loss = train_step(learner, optimizer, batch)
        schedule.step()
        yield loss, batch["tokens"].numel()


def optimizer_of(learner: Learner, rate: float) -> torch.optim.Optimizer:
    """Make the optimizer that all methods share.

    Args:
        learner (Learner): whose trained parameters it steps.
        rate (float): peak learning rate.

    Returns:
        torch.optim.Optimizer: AdamW.
    """
    optimizer = torch.optim.AdamW(learner.groups, lr=rate)
    scale_rates(optimizer)
    return optimizer


def train_step(
    learner: Learner, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> float:
    """Take one step on the mean loss of the labels.

    Args:
        learner (Learner): the model.
        optimizer (torch.optim.Optimizer): of its trained parameters.
        batch (dict[str, torch.Tensor]): ``tokens`` and ``labels``, ``[B, T]``.

    Returns:
        float: the loss before the step, nats a label.
    """
    count, mean_loss = _num_labels(batch), 0.0
    for part in _parts(batch, learner.rows):
        loss = label_losses(learner, part).sum() / count
        loss.backward()
        mean_loss += loss.item()
    torch.nn.utils.clip_grad_norm_(learner.trained, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss


def _num_labels(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def _parts(batch: dict[str, torch.Tensor], rows: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Some rows at a time, without the padding that only the others need; rows end in a label."""
    if rows is None:
        yield batch
        return
    for start in range(0, len(batch["tokens"]), rows):
        part = {key: value[start : start + rows] for key, value in batch.items()}
        longest = int((part["labels"] != IGNORE).any(0).nonzero().max()) + 1
        yield {key: value[:, :longest] for key, value in part.items()}


def label_losses(learner: Learner, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of every label; the LM head sees only the positions that have one.

    Args:
        learner (Learner): the model.
        batch (dict[str, torch.Tensor]): ``tokens`` and ``labels``, ``[B, T]``.

    Returns:
        torch.Tensor: nats, ``[number of labels]``.
    """
    logits, labels = _label_logits(learner, batch)
    return F.cross_entropy(logits, labels, reduction="none")


def _label_logits(
    learner: Learner, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    if learner.device.type == "cuda":
        batch = padded_for_graphs(batch)
    batch = {key: value.to(learner.device) for key, value in batch.items()}
    labels = batch["labels"][:, 1:]
    chosen = labels != IGNORE
    hidden = learner.hidden(batch["tokens"])[:, :-1][chosen]
    head = learner.model.tok_embeddings.weight  # SmolLM2's head is tied to it
    return F.linear(hidden.to(torch.bfloat16), head.to(torch.bfloat16)).float(), labels[chosen]


def padded_for_graphs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pad as the recipes do, so that shapes come up again and their passes can be captured.

    Args:
        batch (dict[str, torch.Tensor]): ``tokens`` and ``labels``, ``[B, T]``.

    Returns:
        dict[str, torch.Tensor]: T is a multiple of 16.
    """
    more = -batch["tokens"].shape[1] % LENGTH_MULTIPLE
    tokens, labels = (
        F.pad(batch["tokens"], (0, more)),
        F.pad(batch["labels"], (0, more), value=IGNORE),
    )
    return {"tokens": tokens, "labels": labels}


@torch.no_grad()
def evaluate(learner: Learner, task: Task) -> dict[str, float]:
    """Measure the validation rows.

    Args:
        learner (Learner): the model.
        task (Task): its rows and metric.

    Returns:
        dict[str, float]: ``held_out_loss``, nats a label, ``first_label_loss``, the same of each
        row's first label alone, and ``held_out``, the task's metric: per cent of right answers
        among the task's words, perplexity, or the loss again.
    """
    learner.model.eval()
    total, right, count, first, rows = 0.0, 0, 0, 0.0, 0
    answers = torch.tensor(task.answers, dtype=torch.long, device=learner.device)
    for batch in task.held_out_batches():
        logits, labels = _label_logits(learner, batch)
        losses = F.cross_entropy(logits, labels, reduction="none")
        chosen = batch["labels"][:, 1:] != IGNORE
        is_first = (chosen.cumsum(1)[chosen] == 1).to(learner.device)
        total += losses.sum().item()
        count += len(labels)
        first += losses[is_first].sum().item()
        rows += int(is_first.sum())
        if task.answers:
            right += int((answers[logits[:, answers].argmax(-1)] == labels).sum())
    loss = total / count
    metric = {"accuracy": 100 * right / count, "perplexity": math.exp(loss), "loss": loss}
    return {
        "held_out_loss": loss,
        "first_label_loss": first / rows,
        "held_out": metric[task.metric],
    }
