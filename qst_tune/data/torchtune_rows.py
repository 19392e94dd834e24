"""Rows and paths that torchtune's own datasets misread silently, or refuse without the cause."""

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from torchtune.data import OpenAIToMessages, ShareGPTToMessages
from torchtune.datasets import SFTDataset

from qst_tune.errors import UserError
from qst_tune.torchtune_compat import rows_and_transform, source_column

_SHAREGPT_NAMES = ("system", "human", "gpt")
_INSTEAD = "dataset._component_=qst_tune.data.auto_dataset"


def check_chat_row(dataset: Any, index: int) -> None:
    """Refuse a conversation that torchtune 0.6.1's chat datasets would not learn as it is.

    Of a message without content, a tool call, its OpenAIToMessages keeps the content of the message
    before (torchtune issue 2617): the model would learn to repeat the user. Of a name other than
    human, gpt and system its ShareGPTToMessages raises ``KeyError`` alone.
    """
    if type(dataset) is not SFTDataset:
        return
    rows, transform = rows_and_transform(dataset)
    if type(transform) is OpenAIToMessages:
        _check(rows[index], source_column(transform, "messages"), _openai_problem)
    elif type(transform) is ShareGPTToMessages:
        _check(rows[index], source_column(transform, "conversations"), _sharegpt_problem)


def _check(row: Mapping[str, Any], column: str, problem_of: Any) -> None:
    messages = row.get(column)
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        problem = problem_of(message) if isinstance(message, Mapping) else None
        if problem:
            raise UserError(f"{column}[{number}]{problem}")


def _openai_problem(message: Mapping[str, Any]) -> str | None:
    if message.get("tool_calls"):
        what = ".tool_calls: torchtune's chat_dataset does not learn tool calls"
    elif message.get("content") is None:
        what = ".content is null"
    else:
        return None
    return f"{what}; use {_INSTEAD}"


def _sharegpt_problem(message: Mapping[str, Any]) -> str | None:
    name = message.get("from")
    if name in _SHAREGPT_NAMES:
        return None
    known = ", ".join(_SHAREGPT_NAMES)
    return (
        f".from is {name!r}: torchtune's chat_dataset knows {known}; rename it, or use {_INSTEAD}, "
        "which takes user and assistant too"
    )


def with_literal_paths(block: DictConfig) -> DictConfig:
    """Let ``datasets`` take the name of an existing file literally, whatever brackets it has."""
    files = block.get("data_files")
    if not files or str(block.get("_component_")).endswith(".auto_dataset"):
        return block
    is_list = isinstance(files, ListConfig)
    names = [_literal(str(file)) for file in (files if is_list else [files])]
    return DictConfig({**block, "data_files": names if is_list else names[0]})


def _literal(name: str) -> str:
    has_mark = any(mark in name for mark in "*?[")
    return escape(name) if has_mark and Path(name).is_file() else name
