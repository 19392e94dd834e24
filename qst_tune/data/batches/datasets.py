"""Datasets as torchtune's recipes build them, every row read once and mistakes made readable."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from torchtune.datasets import ConcatDataset
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.config.components import instantiate
from qst_tune.config.defaults import data_files
from qst_tune.data.batches.checked_rows import CheckedRows, with_literal_paths
from qst_tune.data.batches.packing import align_packs, is_packed, split_off_packing
from qst_tune.data.batches.survey import Survey, survey_rows
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits


def build_dataset(
    block: DictConfig | ListConfig,
    name: str,
    tokenizer: ModelTokenizer,
    *,
    limits: ModelLimits | None = None,
    skip_bad_rows: bool = False,
) -> tuple[Any, list[Survey]]:
    """Build one dataset, or the concatenation of a list of them, and read every row once.

    Returns a map-style dataset of rows that can be used, and the figures of each dataset; packs of
    the user's own code have none. ``name`` is the key of ``block`` in the config; a row outside
    ``limits`` is a bad one, which ``skip_bad_rows`` leaves out. UserError if a dataset cannot be
    built, has no rows, or for a row that cannot be used.
    """
    if not isinstance(block, ListConfig):
        return _build_one(block, name, tokenizer, limits, skip_bad_rows=skip_bad_rows)
    settings: dict[str, Any] = {"limits": limits, "skip_bad_rows": skip_bad_rows}
    parts = [
        build_dataset(part, f"{name}[{i}]", tokenizer, **settings) for i, part in enumerate(block)
    ]
    surveys = [survey for _, of_part in parts for survey in of_part]
    return _concatenate([rows for rows, _ in parts], name), surveys


def _build_one(
    block: DictConfig,
    name: str,
    tokenizer: ModelTokenizer,
    limits: ModelLimits | None,
    *,
    skip_bad_rows: bool,
) -> tuple[Any, list[Survey]]:
    source = block.get("data_files") or block.get("source") or block.get("_component_")
    _refuse_null_rows(block, name)
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
        return align_packs(dataset, name, limits), []
    rows = CheckedRows(dataset, name=name, source=str(source), limits=limits)
    good_rows, survey = survey_rows(rows, tokenizer, skip_bad_rows=skip_bad_rows)
    return good_rows if pack is None else pack.apply(good_rows, tokenizer, name), [survey]


def _refuse_null_rows(block: DictConfig, name: str) -> None:
    """A JSON file whose rows are all null ends the process in pyarrow 26 (SIGSEGV)."""
    for path in map(Path, data_files(block)):
        if block.get("source") == "json" and path.is_file():
            with path.open("rb") as file:
                begins_with_null = file.read(4096).lstrip().startswith(b"null")
            if begins_with_null:
                raise UserError(
                    f"{name}: the first row of {path} is null: write objects of columns"
                )


def _concatenate(parts: list[Any], name: str) -> ConcatDataset:
    concatenation = ConcatDataset(datasets=parts)
    concatenation.packed = all(map(is_packed, parts))  # torchtune knows its own packs only
    if not concatenation.packed and any(map(is_packed, parts)):
        raise UserError(f"{name}: packed must be the same for all datasets of the list")
    return concatenation
