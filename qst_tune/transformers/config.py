"""The ``config.json`` of a side network's directory, and where its backbone is."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from qst_tune.backbone.hub import Parts, fetch_model, is_hub_name
from qst_tune.errors import UserError
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.results.tuned_directory import TRANSFORMERS_MODEL_TYPE

# Settings of a download; a revision is the side network's, not its backbone's.
FETCHING = {"cache_dir", "force_download", "local_files_only", "revision", "token"}
MAX_LABELS = 1 << 16
_SIDE_NETWORK_FILES = (SIDE_NETWORK.weights_file, SIDE_NETWORK.config_file, "recipe_config.yaml")


class QSTConfig(PretrainedConfig):
    """Configuration of a side network and its backbone.

    ``backbone`` is the backbone's directory, or its name on the Hugging Face Hub. Sizes are in the
    backbone's own configuration; loading a model puts those that generation asks for here.
    ``num_hidden_layers`` is then the number of attentions of both networks, which is the number of
    layers of a cache.
    """

    model_type = TRANSFORMERS_MODEL_TYPE
    backbone: str = ""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **settings: object) -> Any:
        """Make a configuration of the content of ``config.json``, which may be anyone's.

        UserError for a number of classes that no classifier has: a name is made for each.
        """
        number = config_dict.get("num_labels", 0)
        if not isinstance(number, int) or not 0 <= number <= MAX_LABELS:
            raise UserError(
                f"config.json: num_labels is {number!r}, and must be at most {MAX_LABELS}"
            )
        return super().from_dict(config_dict, **settings)


def side_network_directory(name: str, **settings: Any) -> Path:
    """Find a side network's directory here, or download it from the Hugging Face Hub.

    ``settings`` such as ``token`` and ``cache_dir`` are for the download. UserError if it fails.
    """
    return _local(name) or fetch_model(name, files=_SIDE_NETWORK_FILES, **settings)


def backbone_directory(
    name: str, beside: Path, parts: Parts = "weights", *, allow_download: bool, **settings: Any
) -> Path:
    """Find the directory of a side network's backbone here, or in huggingface_hub's cache.

    A relative name may also start at the side network's directory, ``beside``, which may be
    anyone's: with ``allow_download`` alone what it names is downloaded. ``settings`` are for that.
    UserError if the backbone is neither here nor available.
    """
    found = _local(name) or (_local(str(beside / name)) if name else None)
    if found is not None:
        return found
    if not is_hub_name(name):
        raise UserError(
            f"the backbone {name!r} is no directory here and no name on the Hugging Face Hub; name "
            "its directory with backbone=<DIR>, or give the model itself"
        )
    if allow_download:
        return fetch_model(name, parts, **settings)
    try:
        return fetch_model(name, parts, **{**settings, "local_files_only": True})
    except UserError as error:
        repo, _, revision = name.partition("@")
        command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        raise UserError(
            f"{beside} names the backbone {name}, which is not in the cache of huggingface_hub: "
            f"pass allow_download=True or backbone={name!r} to download it, or run {command}"
        ) from error


def _local(name: str) -> Path | None:
    return Path(name) if name and Path(name).is_dir() else None
