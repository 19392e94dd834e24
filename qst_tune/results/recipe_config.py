"""What is taken from the ``recipe_config.yaml`` of a result's directory, which may be anyone's.

A config is code: whatever it names as a component is called. Here it is read as plain YAML without
its ``${...}``, and only the components listed below are accepted, with the arguments listed beside
them. They read tensors, texts and numbers; a chat template is Jinja, which runs in a sandbox.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from qst_tune.config.file import PlainConfig
from qst_tune.data import HFChatTokenizer, hf_chat_tokenizer
from qst_tune.data.chat.template_source import template_names
from qst_tune.errors import UserError, first_line
from qst_tune.results.description import MAX_BYTES
from qst_tune.results.tuned_directory import RECIPE_CONFIG

_HF_CHECKPOINTER = "qst_tune.training.HFCheckpointer"
_OLDER_NAMES = {"qst_tune.training.hf_checkpointer.HFCheckpointer": _HF_CHECKPOINTER}
# With the settings that are kept; all paths are replaced.
_CHECKPOINTERS: dict[str, tuple[str, ...]] = {
    "torchtune.training.FullModelHFCheckpointer": (
        "checkpoint_files",
        "model_type",
        "safe_serialization",
    ),
    _HF_CHECKPOINTER: (),
}
_TOKENIZERS = ("qst_tune.data.hf_chat_tokenizer", "qst_tune.data.chat_tokenizer.hf_chat_tokenizer")

log = utils.get_logger("INFO")


@dataclass(frozen=True)
class TunedTemplate:
    """The run's own template, Jinja (None: the backbone's), and the tokens that end an answer."""

    source: str | None
    stop_tokens: list[int]


def checkpointer_of(directory: Path, backbone_directory: Path) -> DictConfig:
    """Return the run's ``checkpointer`` block, for a backbone that may have moved.

    UserError if the run's config cannot be read, or names an unknown checkpointer.
    """
    path = directory / RECIPE_CONFIG
    block = _block(directory, "checkpointer")
    name = _OLDER_NAMES.get(str(block.get("_component_")), block.get("_component_"))
    if name not in _CHECKPOINTERS:
        raise UserError(
            f"{path} names the checkpointer {name!r}, not {' or '.join(_CHECKPOINTERS)}"
        )
    kept = {key: block[key] for key in _CHECKPOINTERS[name] if key in block}
    _check_files(path, kept.get("checkpoint_files"), backbone_directory)
    if name != _HF_CHECKPOINTER:  # torchtune's make a directory of their own: one that exists
        kept["output_dir"] = tempfile.gettempdir()
    found = {"_component_": name, **kept, "checkpoint_dir": str(backbone_directory)}
    return OmegaConf.create(found)


def tuned_template(directory: Path, backbone: Path) -> TunedTemplate | None:
    """Read the run's chat template; None for a tokenizer of torchtune, or none.

    A file that the config names is not read. ``backbone`` has the tokenizer's files. UserError if
    the template does not render messages.
    """
    block = _block(directory, "tokenizer")
    if block.get("_component_") not in _TOKENIZERS or not any(backbone.glob("tokenizer*")):
        return None
    given = _without_file(block.get("chat_template"), directory)
    tokenizer = hf_chat_tokenizer(str(backbone), chat_template=given)
    template = tokenizer.chat_template
    source = template.source if given and template else None
    return TunedTemplate(source, tokenizer.stop_tokens)


def described_tokenizer(side_network: str, checkpoint_dir: str) -> HFChatTokenizer:
    """Build the tokenizer of a backbone's directory, with the chat template of a side network's."""
    found = tuned_template(Path(side_network), Path(checkpoint_dir))
    return hf_chat_tokenizer(checkpoint_dir, chat_template=found.source if found else None)


def read_recipe_config(directory: Path) -> PlainConfig:
    """Read the run's config as plain YAML, without ``${...}``; what cannot be read is empty."""
    path = directory / RECIPE_CONFIG
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        log.warning(f"{path} cannot be read: {first_line(error)}")
        return {}
    return content if isinstance(content, dict) else {}


def _block(directory: Path, name: str) -> PlainConfig:
    block = read_recipe_config(directory).get(name)
    return block if isinstance(block, dict) else {}


def _check_files(path: Path, files: object, backbone_directory: Path) -> None:
    """Refuse names of files that leave the directory which the user named."""
    if isinstance(files, dict):  # torchtune's: a pattern and the last number
        files = [value for value in files.values() if not isinstance(value, int)]
    for name in files if isinstance(files, list) else []:
        home = backbone_directory.resolve()
        if not isinstance(name, str) or ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{path}: checkpointer.checkpoint_files has {name!r}, outside {home}")


def _without_file(template: object, directory: Path) -> str | None:
    if not isinstance(template, str) or not template.strip():
        return None
    if template.strip() in template_names() or "{{" in template or "{%" in template:
        return template
    log.warning(f"{directory}: its chat template {template!r} is a file; the backbone's is used")
    return None
