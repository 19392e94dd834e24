"""What a run prints of its data before the first step."""

import inspect
from collections.abc import Iterable
from itertools import groupby

from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from tqdm import tqdm

from qst_tune.data.batches.survey import Survey
from qst_tune.data.batches.training_data import TrainingData
from qst_tune.distributed.processes import is_main_process
from qst_tune.modules.model_limits import SEQUENCES

LEARNT = (">>>", "<<<")
_MAX_CHARACTERS = 600  # of each part of the first row


def report_data(data: TrainingData, tokenizer: ModelTokenizer) -> None:
    """Print what a run learns from, on the main process."""
    if not is_main_process():
        return
    for survey in data.surveys:
        tqdm.write(report(survey, tokenizer))
    for survey in data.validation_surveys:
        tqdm.write(report(survey))
    for note in data.notes:
        tqdm.write(note)


def report(survey: Survey, tokenizer: ModelTokenizer | None = None) -> str:
    """Describe a dataset; with a tokenizer, its first row too."""
    first_row = _first_row(survey, tokenizer) if tokenizer else []
    return "\n".join([f"{survey.name}: {survey.description}", *_figures(survey), *first_row])


def _figures(survey: Survey) -> Iterable[str]:
    share = survey.num_labels / max(1, survey.num_tokens)
    to_learn = f", {_count(survey.num_labels, 'label')} to learn ({share:.0%})"
    yield (
        f"  {_count(len(survey.labels), 'row')}, {_count(survey.num_tokens, 'token')} (longest row "
        f"{survey.longest:,}){'' if survey.has_classes else to_learn}"
    )
    if survey.num_cut:
        yield (
            f"  {_count(survey.num_cut, 'row')} cut to tokenizer.max_seq_len={survey.limit}, with "
            f"them {_count(survey.labels_lost, 'label')}"
        )
    if survey.num_dropped:
        yield f"  {_count(survey.num_dropped, 'row')} dropped (on_bad_row=skip):"
        yield from (f"    {reason}" for reason in survey.reasons)
        if survey.num_dropped > len(survey.reasons):
            yield f"    and {survey.num_dropped - len(survey.reasons):,} more"


def _first_row(survey: Survey, tokenizer: ModelTokenizer) -> Iterable[str]:
    for tokens, labels in SEQUENCES:
        if tokens not in survey.first or not isinstance(survey.first[tokens], list):
            continue
        name = tokens.partition("_")[0]
        which = f", {name}" if name != "tokens" else ""
        label = survey.first.get(labels, survey.first[tokens])
        if isinstance(label, int | float):
            yield f"  the first row, label {label}:"
        else:
            yield f"  the first row{which}; what is learnt is between {LEARNT[0]} and {LEARNT[1]}:"
        yield from (f"    {line}" for line in _marked(survey.first[tokens], label, tokenizer))


def _marked(tokens: list[int], labels: object, tokenizer: ModelTokenizer) -> list[str]:
    values = labels if isinstance(labels, list) else [CROSS_ENTROPY_IGNORE_IDX] * len(tokens)
    is_learnt = [label != CROSS_ENTROPY_IGNORE_IDX for label in values]
    text = ""
    for learnt, part in groupby(zip(is_learnt, tokens, strict=True), key=lambda pair: pair[0]):
        decoded = _shortened(_decode(tokenizer, [token for _, token in part]))
        text += f"{LEARNT[0]}{decoded}{LEARNT[1]}" if learnt else decoded
    return text.splitlines()


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _decode(tokenizer: ModelTokenizer, tokens: list[int]) -> str:
    """Decode with special tokens, as far as a tokenizer shows them."""
    wanted = {"skip_special_tokens": False, "truncate_at_eos": False}
    taken = inspect.signature(tokenizer.decode).parameters
    return str(tokenizer.decode(tokens, **{k: v for k, v in wanted.items() if k in taken}))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)
