"""Datasets and their batches as torchtune's recipes build them, with mistakes made readable."""

from collections.abc import Sized
from functools import partial
from typing import Any

import torch.nn.functional as F
from omegaconf import DictConfig, ListConfig
from torchtune.datasets import ConcatDataset

from qst_tune.config.cli import instantiate
from qst_tune.data.batches import Batch, Collate
from qst_tune.data.labels import align_labels
from qst_tune.data.packing import align_packs, is_packed, split_off_packing
from qst_tune.data.rows import CheckedRows
from qst_tune.data.survey import Survey, survey_rows
from qst_tune.data.torchtune_rows import with_literal_paths
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits
from qst_tune.torchtune_compat import component_of

LENGTH_MULTIPLE = 16
DEFAULT_COLLATE = "torchtune.data.padded_collate_sft"


def build_dataset(
    block: DictConfig | ListConfig,
    name: str,
    tokenizer: Any,
    *,
    limits: ModelLimits | None = None,
    skip_bad_rows: bool = False,
    surveys: list[Survey] | None = None,
) -> Any:
    """Build one dataset, or the concatenation of a list of them, and read every row once.

    Args:
        block (DictConfig | ListConfig): of the config.
        name (str): its key, for error messages.
        tokenizer (Any): torchtune model tokenizer.
        limits (ModelLimits | None): a row that does not fit is a bad one; None takes any.
        skip_bad_rows (bool): leave rows out that cannot be used.
        surveys (list[Survey] | None): gets the figures of each dataset.

    Returns:
        Any: a map-style dataset of rows that can be used.

    Raises:
        UserError: if it cannot be built, has no rows, or for a row that cannot be used.
    """
    if isinstance(block, ListConfig):
        settings: dict[str, Any] = {"skip_bad_rows": skip_bad_rows, "surveys": surveys}
        parts = [
            build_dataset(part, f"{name}[{i}]", tokenizer, limits=limits, **settings)
            for i, part in enumerate(block)
        ]
        return _concatenate(parts, name)
    source = block.get("data_files") or block.get("source") or block.get("_component_")
    pack = split_off_packing(block)
    try:
        own_block = with_literal_paths(pack.block if pack else block)
        dataset = instantiate(own_block, name, tokenizer)
    except UserError as error:
        if isinstance(error.__cause__, StopIteration):  # from datasets, for a file without a row
            raise UserError(f"{name}: {source} has no rows") from error
        raise
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise UserError(f"{name}: {source} has no rows")
    if is_packed(dataset):  # by the user's own code
        return align_packs(dataset, name, limits)
    rows = CheckedRows(dataset, name=name, source=str(source), limits=limits)
    good_rows, survey = survey_rows(rows, tokenizer, skip_bad_rows=skip_bad_rows)
    if surveys is not None:
        surveys.append(survey)
    return good_rows if pack is None else pack.apply(good_rows, tokenizer, name)


def _concatenate(parts: list[Any], name: str) -> ConcatDataset:
    concatenation = ConcatDataset(datasets=parts)
    concatenation.packed = all(map(is_packed, parts))  # torchtune knows its own packs only
    if not concatenation.packed and any(map(is_packed, parts)):
        raise UserError(f"{name}: packed must be the same for all datasets of the list")
    return concatenation


def build_collate(limits: ModelLimits, component: str = DEFAULT_COLLATE) -> Collate:
    """Build the function that makes ``tokens`` and aligned ``labels`` ``[B, T]`` of unpacked rows.

    Rows are padded on the right to the longest, and on to a multiple of 16 tokens, at most the
    model's ``max_seq_len``: on a CPU every new length compiles some forty matrix kernels that stay
    in memory, 0.75 GiB over one epoch of SmolLM2-135M. ``component`` is a collate function of
    torchtune's form.
    """
    pad_id, ignore_index = limits.pad_id, limits.ignore_index
    padding = {"padding_idx": pad_id, "ignore_idx": ignore_index}
    try:
        collate = partial(component_of(component), **padding)
    except Exception as error:  # importing a user's own module may raise anything
        raise UserError(f"collate_fn={component} cannot be imported") from error
    fill = {"tokens": pad_id, "labels": ignore_index}
    return partial(_collate_and_pad, collate=collate, fill=fill, max_seq_len=limits.max_seq_len)


def _collate_and_pad(
    rows: list[Any], *, collate: Collate, fill: dict[str, int], max_seq_len: int
) -> Batch:
    batch = collate(rows)
    length = batch["tokens"].shape[1]
    missing = max(0, min(length + -length % LENGTH_MULTIPLE, max_seq_len) - length)
    if batch.keys() - fill.keys():  # a mask or positions of the user's own have this length
        missing = 0
    labels = align_labels(
        batch["labels"], ignore_index=fill["labels"], input_pos=batch.get("input_pos")
    )
    parts = {"tokens": batch["tokens"], "labels": labels}
    return batch | {key: F.pad(part, (0, missing), value=fill[key]) for key, part in parts.items()}
