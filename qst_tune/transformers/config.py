"""What ``config.json`` in the folder of a side network says, and where its backbone is."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import PretrainedConfig

from qst_tune.errors import UserError
from qst_tune.training.side_checkpoint import TRANSFORMERS_MODEL_TYPE

# How to fetch a folder; a revision is one of the side network's, not of its backbone's.
FETCHING = {"cache_dir", "force_download", "local_files_only", "revision", "token"}
# Weights as tensors, and the small files of models and tokenizers; no pickle and no code.
_WANTED = ["*.safetensors", "*.json", "*.yaml", "*.jinja", "*.txt", "*.model"]


class QSTConfig(PretrainedConfig):
    """Configuration of a side network and its backbone.

    Sizes stand in the backbone's own configuration; loading a model puts those that generation
    asks for here. ``num_hidden_layers`` is then the number of attentions of both networks, which
    is the number of layers of a cache.

    Attributes:
        backbone (str): folder of the backbone, or its name on the Hugging Face Hub.
    """

    model_type = TRANSFORMERS_MODEL_TYPE
    backbone: str = ""


def local_folder(name: str, beside: Path | None = None, **settings: Any) -> Path:
    """Find a model's folder on this machine, or fetch it from the Hugging Face Hub.

    Args:
        name (str): a folder, or a name on the hub.
        beside (Path | None): a relative folder may also start here.
        **settings (Any): how to fetch it, such as ``token`` and ``cache_dir``.

    Returns:
        Path: the folder.

    Raises:
        UserError: if it is neither here nor to be had.
    """
    for folder in [Path(name), *([beside / name] if beside else [])]:
        if name and folder.is_dir():
            return folder
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, **settings))
    except (OSError, HFValidationError) as error:  # the hub's errors are OSErrors
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name!r} is no folder here and cannot be fetched from the Hugging Face Hub "
            f"({reason[:200]}); name the backbone's folder with backbone=<folder>"
        ) from error
