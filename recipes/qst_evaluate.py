r"""Compare a tuned model with its base on files of this machine, as a table.

Examples::

    tune run qst_evaluate --config smollm2/135M_qst text=<TEST.txt>
    tune run qst_evaluate --config smollm2/135M_qst \
        questions=<MMLU_TEST.jsonl> examples=<MMLU_DEV.jsonl> limit=200

The config is that of the training run, of qst_finetune or of peqa_finetune. What it has is
measured: ``dataset_val`` (loss of the answers, in the format of training), ``text`` (perplexity of
a file) and ``questions`` (accuracy on rows with question, choices and answer, behind
``num_examples`` answered ones of the same subject from ``examples``). The table is also written to
``evaluation.json`` in ``output_dir``. With ``trials`` it has a column for each trial of that
run, all of them over one pass of the model.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from torchtune import utils

from qst_tune.config.check import read_config, read_trials
from qst_tune.config.cli import run_recipe
from qst_tune.config.components import instantiate
from qst_tune.config.keys import key
from qst_tune.config.schema import Blocks, TunedModelConfig, training_key
from qst_tune.config.trials import TRIALS_DIRECTORY, title
from qst_tune.data.batches.datasets import build_dataset
from qst_tune.data.batches.loader import BatchLoader
from qst_tune.data.batches.read_once import ReadOnce
from qst_tune.data.batches.training_data import collate_of, text_collate
from qst_tune.errors import UserError
from qst_tune.evaluation.multiple_choice import Question, question_passes, read_questions
from qst_tune.evaluation.perplexity import read_text, text_passes
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.model_limits import limits_of
from qst_tune.results.loading import TunedModel, load_side_network, load_tuned_model
from qst_tune.results.output_directory import output_directory
from qst_tune.training.language_modelling import validation_passes
from qst_tune.training.task import Passes, complete, on_device
from qst_tune.training.trials import read_in_turn


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(TunedModelConfig):
    """The keys of this recipe."""

    text: Path | None = key("text file: perplexity and bits a byte", default=None)
    window: int = key("tokens of text that are run at once", default=1024, least=1)
    max_text_tokens: int | None = key("of the beginning of text; null: all", default=None, least=2)
    questions: Path | None = key(
        "jsonl file with question, choices, answer and subject: accuracy", default=None
    )
    examples: Path | None = key("jsonl file of answered questions to put before each", default=None)
    num_examples: int = key("answered questions of the same subject", default=5, least=0)
    limit: int | None = key(
        "questions, spread evenly over the file; null: all", default=None, least=1
    )
    trials: Blocks | None = training_key("trials")
    dataset_val: Blocks | None = training_key("dataset_val")
    on_bad_row: Literal["error", "skip"] = training_key("on_bad_row")
    batch_size_val: int | None = training_key("batch_size_val")
    batch_size: int = training_key("batch_size", default=8)
    collate_fn: str | None = training_key("collate_fn")
    output_dir: Path = training_key("output_dir")


RESULT_FILE = "evaluation.json"

# Measures a model with the side network that is in it at each pass.
Measure = Callable[[], Passes[dict[str, float]]]

log = utils.get_logger("INFO")


def measures(cfg: EvaluationConfig, tuned: TunedModel) -> Iterator[Measure]:
    """Read what the config names, and yield functions that measure it."""
    batch_size = cfg.batch_size_val or cfg.batch_size
    if cfg.dataset_val:
        yield _validation(cfg, cfg.dataset_val, tuned, batch_size)
    if cfg.text:
        yield _text(cfg, cfg.text, tuned, batch_size)
    if cfg.questions:
        yield _questions(cfg, read_questions(cfg.questions), tuned, batch_size)


def _validation(
    cfg: EvaluationConfig, block: Blocks, tuned: TunedModel, batch_size: int
) -> Measure:
    model, device = tuned.model, tuned.model.tok_embeddings.weight.device
    loss = LinearCrossEntropyLoss()
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")  # with its limit, as in training
    limits = limits_of(model, tokenizer, loss.ignore_index)
    skip = cfg.on_bad_row == "skip"
    rows, _ = build_dataset(block, "dataset_val", tokenizer, limits=limits, skip_bad_rows=skip)
    collate = collate_of(rows, text_collate(cfg.collate_fn, limits))
    loader = BatchLoader(rows, collate, batch_size=batch_size, seed=None, drop_last=False)
    batches = ReadOnce(loader, partial(on_device, device=device))
    loss.set_model_output(model)  # what else is measured here asks for no logits of all tokens

    def measure() -> Passes[dict[str, float]]:
        found = yield from validation_passes(model, loss, batches, device)
        return {"validation loss": found}

    return measure


def _text(cfg: EvaluationConfig, file: Path, tuned: TunedModel, batch_size: int) -> Measure:
    tokens, num_bytes = read_text(file, tuned.tokenizer, cfg.max_text_tokens)
    window = min(cfg.window, tuned.model.max_seq_len)

    def measure() -> Passes[dict[str, float]]:
        how = {"window": window, "batch_size": batch_size}
        score = yield from text_passes(tuned.model, tokens, num_bytes, **how)
        return {"perplexity": score.perplexity, "bits a byte": score.bits_per_byte}

    return measure


def _questions(
    cfg: EvaluationConfig, questions: list[Question], tuned: TunedModel, batch_size: int
) -> Measure:
    examples = read_questions(cfg.examples) if cfg.examples else []
    num_examples = cfg.num_examples if examples else 0
    foreign = {question.subject for question in questions} - {e.subject for e in examples}
    if num_examples and foreign:
        raise UserError(f"examples={cfg.examples} has none of the subject {min(foreign)!r}")
    limit = cfg.limit or len(questions)
    # Evenly over the file, where the questions of a subject often stand together.
    chosen = [questions[i * len(questions) // limit] for i in range(min(limit, len(questions)))]

    def measure() -> Passes[dict[str, float]]:
        score = yield from question_passes(
            tuned.model,
            tuned.tokenizer,
            chosen,
            examples,
            num_examples=num_examples,
            batch_size=batch_size,
        )
        return {"accuracy": score.accuracy, "its standard error": score.standard_error}

    return measure


def trials_of(cfg: EvaluationConfig) -> dict[str, Path]:
    """Return the results of the trials of the config's run by name; UserError if there are none."""
    settings = read_trials(cfg).settings
    found = {}
    for number, own in enumerate(settings, start=1):
        path = cfg.output_dir / TRIALS_DIRECTORY / str(number) / "side_network"
        if path.is_dir():
            found[f"trial {number} ({title(own)})"] = path
    if settings and not found:
        raise UserError(f"trials: {cfg.output_dir / TRIALS_DIRECTORY} has no results")
    return found


def measured_in_turn(
    tuned: TunedModel, directories: Mapping[str, Path], to_measure: Sequence[Measure]
) -> dict[str, dict[str, float]]:
    """Measure several side networks over one pass of the backbone a batch."""
    model = tuned.model
    sides = [(load_side_network(model, d, tuned.backbone), None) for d in directories.values()]
    if not sides:
        return {}
    parts = [read_in_turn(model, sides, measure) for measure in to_measure]
    each = [_joined(list(figures)) for figures in zip(*parts, strict=True)]
    return dict(zip(directories, each, strict=True))


def _joined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Write figures by name, by the model's title, as a Markdown table."""
    names = list(next(iter(results.values())))
    cells = [["", *results]]
    cells += [[name, *(f"{found[name]:.4f}" for found in results.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join(f"| {line} |" for line in lines)


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = read_config(raw, EvaluationConfig)
    if not any((cfg.dataset_val, cfg.text, cfg.questions)):
        raise UserError("nothing to measure: name a text, questions or a dataset_val")
    directories = trials_of(cfg)
    with output_directory(cfg.output_dir) as directory:
        if directories:  # each of them instead of one
            without: DictConfig = raw.copy()
            without.side_network = None
            cfg = read_config(without, EvaluationConfig)
        tuned = load_tuned_model(cfg)
        to_measure = list(measures(cfg, tuned))
        with tuned.untuned():
            results = {"quantised base model": _joined([complete(m()) for m in to_measure])}
        if tuned.is_tuned:
            results[tuned.title] = _joined([complete(measure()) for measure in to_measure])
        results |= measured_in_turn(tuned, directories, to_measure)
        (directory / RESULT_FILE).write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    log.info(f"written to {directory / RESULT_FILE}")


if __name__ == "__main__":
    run_recipe(main, EvaluationConfig, __doc__)
