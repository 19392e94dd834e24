"""Find a model by its name on the Hugging Face Hub, and download only the files that are needed."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qst_tune.backbone.directory import FORMATS, weight_files
from qst_tune.errors import UserError, nearest

# How much of a model: its config.json; that and the tokenizer; that and the weights.
Parts = Literal["config", "tokenizer", "weights"]

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
# The directory of a revision in huggingface_hub's cache.
_CACHED = re.compile(
    r"(?P<directory>.*/models--(?P<org>[^/]+?)--(?P<model>[^/]+)/snapshots/(?P<sha>\w+))"
)
_TOKENIZER = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip


def is_hub_name(name: str) -> bool:
    """Whether it is ``org/name`` or ``org/name@revision``, and no directory of this machine."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def hub_name(path: str | Path) -> str | None:
    """Return ``org/name@commit`` of a path in huggingface_hub's cache, followed by a file's name.

    None for a path outside the cache.
    """
    found = _CACHED.match(Path(path).absolute().as_posix())
    if found is None:
        return None
    rest = Path(path).absolute().as_posix().removeprefix(found["directory"])
    return f"{found['org']}/{found['model']}@{found['sha']}{rest}"


def model_name(directory: Path) -> tuple[str, str]:
    """Return a model's name on the hub and its commit, or the directory's own name and ""."""
    name, _, revision = (hub_name(directory) or directory.resolve().name).partition("@")
    return name, revision


def local_model(name: str, parts: Parts = "weights") -> Path:
    """Return the directory of that name, or the hub's model, downloaded if needed."""
    return fetch_model(name, parts) if is_hub_name(name) else Path(name)


def fetch_model(
    name: str, parts: Parts = "weights", *, files: Collection[str] = (), **settings: Any
) -> Path:
    """Find a model's directory in huggingface_hub's cache, and download what is missing.

    Only tensors, JSON and text are downloaded, never code; ``.bin`` weights only where the model
    has no safetensors, and nothing of other formats (GGUF, ONNX, ``original/``). Of several
    processes one downloads a file and the others wait for it (huggingface_hub locks each file).

    ``name`` is ``org/name`` or ``org/name@revision``. ``files`` that a config names replace the
    weights that are found by their usual names. ``settings`` are those of ``snapshot_download``,
    such as ``token`` and ``cache_dir``. UserError if the model is not on the hub, is gated, lacks
    what is needed, or the hub cannot be reached and the cache does not have it.
    """
    repo, _, revision = name.partition("@")
    settings["revision"] = revision or settings.get("revision")
    try:
        return _fetch(repo, parts, files, settings)
    except UserError:
        raise
    # Connection errors are of huggingface_hub's HTTP library, which differs between its versions.
    except Exception as error:
        raise UserError(f"{name}: {_reason(repo, revision, error)}") from error


def _fetch(repo: str, parts: Parts, files: Collection[str], settings: dict[str, Any]) -> Path:
    small = ["config.json", *(_TOKENIZER if parts != "config" else ())]
    indices = [f"{stem}.{kind}.index.json" for stem, kind in FORMATS]
    wanted = [*small, *(indices if parts == "weights" else ())]
    directory = Path(snapshot_download(repo, allow_patterns=wanted, **settings))
    if not (directory / "config.json").is_file():
        raise UserError(f"{repo} has no config.json: it is not a model in Hugging Face's format")
    if parts != "weights":
        return directory
    settings = {**settings, "revision": directory.name}  # the same commit for all files
    for patterns in [list(files)] if files else _weight_patterns(directory):
        snapshot_download(repo, allow_patterns=patterns, **settings)
        if files or any(next(directory.glob(pattern), None) for pattern in patterns):
            break
    if not files:
        _check_weights(repo, directory)
    return directory


def _weight_patterns(directory: Path) -> Iterator[list[str]]:
    """What to look for, one format after the other; shards where there is an index of them."""
    for stem, kind in FORMATS:
        is_indexed = (directory / f"{stem}.{kind}.index.json").is_file()
        shards = f"{stem}-*-of-*.{kind}"
        yield [shards] if is_indexed else [f"{stem}.{kind}", shards]


def _check_weights(repo: str, directory: Path) -> None:
    try:
        weight_files(directory)
    except UserError as error:
        text = str(error).replace(str(directory), repo)
        hint = f"; {_OFFLINE}" if constants.HF_HUB_OFFLINE else ""
        raise UserError(f"{text}{hint}") from error


_OFFLINE = "HF_HUB_OFFLINE=1 forbids to download: unset it, or name a local directory"


def _reason(repo: str, revision: str, error: Exception) -> str:
    """What is wrong, and what to do, in one line."""
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, GatedRepoError):
        return f"the model is gated: accept its terms at {page}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"neither a directory here nor a model on the Hugging Face Hub{_similar(repo)}; check "
            "the name, or log in with `hf auth login` if the model is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the model has no revision {revision!r}: see {page}/tree/main for its branches"
    if isinstance(error, HFValidationError):
        return f"no directory here, and no name of the Hugging Face Hub ({_one_line(error)})"
    if isinstance(error, HfHubHTTPError):
        return (
            f"the Hugging Face Hub answered: {_one_line(error)}; a token is set by `hf auth login`"
        )
    if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, OSError):
        return _unreachable(repo)
    return f"it cannot be downloaded to {constants.HF_HUB_CACHE}: {_one_line(error)}"


def _unreachable(repo: str) -> str:
    here = f"no directory here{_similar(repo)}, not complete in the cache of huggingface_hub"
    if constants.HF_HUB_OFFLINE:
        return f"{here}, and {_OFFLINE}"
    return (
        f"{here}, and {constants.ENDPOINT} cannot be reached: download it where that can "
        f"(tune download {repo} --output-dir <DIR>) and name its directory"
    )


def _similar(name: str) -> str:
    """The local directory that may have been meant."""
    parent, wanted = Path(name).parent, Path(name).name
    here = {path.name: path for place in (Path(), parent) for path in _directories(place)}
    near = nearest(wanted, here, cutoff=0.7)
    return f" (did you mean the directory {here[near]}?)" if near else ""


def _directories(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from (path for path in place.iterdir() if path.is_dir())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
