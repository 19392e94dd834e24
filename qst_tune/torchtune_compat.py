"""Every private name of torchtune 0.6.1 that we use, under a public one.

Two files name private modules of torchtune besides this one: ``plugin.py`` and ``cli_hints.py``
extend its command line, and import nothing before it.
"""

from pathlib import Path
from typing import Any

import torch
from torchtune.config import _utils as config_utils
from torchtune.modules import TransformerDecoder, attention_utils
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles

Mask = attention_utils._MaskType
component_of = config_utils._get_component_from_path
has_component = config_utils._has_component
remove_key = config_utils._remove_key_by_dotpath


def file_names(files: dict[str, Any]) -> list[str]:
    """Return the names that a ``checkpoint_files`` with a format and a last number stands for."""
    names: list[str] = FormattedCheckpointFiles.from_dict(files).build_checkpoint_filenames()
    return names


def checkpoint_directory(checkpointer: Any) -> Path:
    """Return the directory that a checkpointer reads."""
    return Path(checkpointer._checkpoint_dir)


def checkpoint_paths(checkpointer: object) -> list[Path] | None:
    """Return the files that a checkpointer reads; None if it has no list of them."""
    return getattr(checkpointer, "_checkpoint_paths", None)


def take_paths(checkpointer: Any, paths: list[Path]) -> None:
    """Let a checkpointer read these files only."""
    checkpointer._checkpoint_paths = paths


def check_inputs(
    decoder: TransformerDecoder, tokens: torch.Tensor, **inputs: torch.Tensor | None
) -> None:
    """Refuse what torchtune's decoder refuses: too long sequences, masks that caches need."""
    decoder._validate_inputs(tokens.shape[1], **inputs)


def rows_and_transform(dataset: Any) -> tuple[Any, Any]:
    """Return the rows of an ``SFTDataset`` and what makes messages of one."""
    return dataset._data, dataset._message_transform


def source_column(transform: Any, column: str) -> str:
    """Return the name of a column in the rows."""
    name: str = transform._column_map[column]
    return name
