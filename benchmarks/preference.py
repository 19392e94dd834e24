"""What a step of DPO costs beside a step of fine-tuning: ``python -m benchmarks.preference``.

Both train a side network of the same model on the same rows: half of them as chosen and half as
rejected answers, or all of them as text to be learnt. Steps are taken by turns.
"""

import argparse
from functools import partial
from statistics import median

import torch
from torchtune.rlhf.loss import DPOLoss

from benchmarks.backbones import BACKBONES
from benchmarks.decoding import milliseconds_by_turns, relative_speed
from benchmarks.methods import (
    CPU,
    SMOLLM2,
    Batch,
    Trainee,
    ignore_known_warnings,
    qst_model,
    qst_trainee,
)
from qst_tune.data.batches.collate import align_labels
from qst_tune.training.preference import PreferenceTask


def random_pairs(vocab_size: int, num_pairs: int, num_tokens: int, num_prompt: int) -> Batch:
    """Draw pairs of answers to a prompt.

    Args:
        vocab_size (int): of the model.
        num_pairs (int): half of the rows.
        num_tokens (int): of a row, prompt and answer.
        num_prompt (int): of these, without a label.

    Returns:
        Batch: ``tokens`` and ``labels``, ``[2 num_pairs, num_tokens]``.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (2 * num_pairs, num_tokens), generator=generator)
    tokens[num_pairs:, :num_prompt] = tokens[:num_pairs, :num_prompt]
    labels = tokens.clone()
    labels[:, :num_prompt] = -100
    return {"tokens": tokens, "labels": align_labels(labels)}


def preference_step(trainee: Trainee, task: PreferenceTask, batch: Batch) -> float:
    """Take a step of DPO, as the recipe does.

    Args:
        trainee (Trainee): its own loss is not used.
        task (PreferenceTask): over its model.
        batch (Batch): the chosen answers first.

    Returns:
        float: the loss before the step, nats a pair.
    """
    return trainee.descend(*task.loss(trainee.model, batch))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table.

    Args:
        arguments (list[str] | None): of the command line; None: this program's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference")
    parser.add_argument("--backbone", choices=[*BACKBONES, SMOLLM2], default="200m")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[0, 256])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(arguments)
    ignore_known_warnings()
    model = qst_model(asked.backbone)
    trainee, task = qst_trainee(model), PreferenceTask(DPOLoss(), CPU)
    print("| tokens with a label | fine-tuning, ms | DPO, ms | DPO / fine-tuning |")
    print("| --- | --- | --- | --- |")
    for num_prompt in asked.prompt_tokens:
        vocab_size = model.tok_embeddings.num_embeddings
        batch = random_pairs(vocab_size, asked.pairs, asked.tokens, num_prompt)
        steps = {
            "fine-tuning": partial(trainee.step, batch),
            "DPO": partial(preference_step, trainee, task, batch),
        }
        times = milliseconds_by_turns(steps, asked.rounds)
        ratio, low, high = relative_speed(times["DPO"], times["fine-tuning"])
        cells = [f"{median(taken):.0f} (least {min(taken):.0f})" for taken in times.values()]
        answer = f"{asked.tokens - num_prompt} of {asked.tokens}"
        print(f"| {answer} | {cells[0]} | {cells[1]} | {ratio:.2f} ({low:.2f}-{high:.2f}) |")


if __name__ == "__main__":
    main()
