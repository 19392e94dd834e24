"""Upload a result's directory to the Hugging Face Hub, after a check of its content."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from qst_tune.config.record import looks_secret
from qst_tune.errors import UserError
from qst_tune.results import peft_adapter
from qst_tune.results.description import read_description
from qst_tune.results.tuned_directory import (
    CARD_FILE,
    RECIPE_CONFIG,
    check_finite,
    read_tensors,
)

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# An absolute path of at least two parts, or one below a home directory; no part of a URL.
_MACHINE_PATH = re.compile(r"(?<![\w:/.~-])(?:~/|/[\w.-]+/)[\w./-]+|\b[A-Za-z]:\\\\?\w+")


def push_directory(directory: Path, name: str, *, private: bool = False) -> str:
    """Upload a side network or a set of scales, and return the address of the repository.

    A missing repository, ``org/name``, is created: private, or as the account's default has it
    (public). The token is the one that huggingface_hub finds; it is neither stored nor shown. A
    damaged result, other files, local paths and a refusal of the hub are a UserError.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is not of the form org/name")
    files = _check(directory)
    token = _token()
    try:
        api = HfApi(token=token)
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=directory,
            allow_patterns=files,
            commit_message="Upload a result of qst_tune",
        )
    # Connection errors are of huggingface_hub's HTTP library, which differs between its versions.
    except Exception as error:
        raise UserError(f"{name}: {_reason(error)}") from error
    return str(address)


def _check(directory: Path) -> list[str]:
    """Names of the files to upload, all of which were checked."""
    description = read_description(directory)
    form = description.form
    check_finite(directory / form.weights_file, read_tensors(directory, form))
    own = (form.weights_file, form.config_file, RECIPE_CONFIG, "config.json", CARD_FILE)
    known = {*own, *peft_adapter.FILES}
    inside = directory.rglob("*")
    files = sorted(p.relative_to(directory).as_posix() for p in inside if not p.is_dir())
    strange = [name for name in files if name not in known]
    if strange:
        raise UserError(
            f"{directory} has other files than a result's, such as {strange[0]}: move them, or "
            "make a clean copy with `python -m qst_tune.sharing share`"
        )
    for name in files:
        if not name.endswith(".safetensors"):
            _check_text(directory / name)
    peft_adapter.public_files(directory, "")  # or it is damaged
    if description.is_classifier:
        raise UserError(f"{directory} is a classifier; only models that write text are shared")
    return files


def _check_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if looks_secret(text):
        raise UserError(
            f"{path} has what looks like a token or a password: make a directory without with "
            "`python -m qst_tune.sharing share`, and push that"
        )
    found = _MACHINE_PATH.search(text)
    if found:
        raise UserError(
            f"{path} has a path of this machine, {found.group()}: make a directory without with "
            "`python -m qst_tune.sharing share`, and push that"
        )


def _token() -> str:
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE=1 forbids uploads: unset it")
    token = huggingface_hub.get_token()
    if not token:
        raise UserError(f"there is no token of the Hugging Face Hub: {_LOGIN}")
    return str(token)


def _reason(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the Hugging Face Hub does not accept the token: {_LOGIN}"
    if status == 403:
        return (
            "the token may not write there: check the name of the organisation, and that the "
            "token has write access (hf auth whoami)"
        )
    if status is None and not isinstance(error, OSError | ValueError):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}); try again later"
    return f"the upload failed: {' '.join(str(error).split())[:200]}"
