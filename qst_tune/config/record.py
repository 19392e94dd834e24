"""A config as the files of a run have it: without secrets and without values of the environment."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qst_tune.config.file import PlainConfig

# token, hf_token, api_key, db_password ..., but not the tokens of a tokenizer, as pad_token.
_SECRET = re.compile(
    r"(?:.*_)?(?:passwords?|passwd|secrets?|credentials?|api_?key|access_?key|private_?key)"
    r"|(?:.*(?:auth|access|api|hf|hub|bearer|session)_)?tokens?|keys?",
    re.IGNORECASE,
)
# Of Hugging Face, OpenAI and others, GitHub, Slack, Amazon; user:password@ in an address.
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|xox[abprs]-[\w-]{8,}|AKIA[0-9A-Z]{12,})"
    r"|://[^/\s:@]+:[^/\s@]+@"
)
_REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")  # ${key.of.block}, no ${resolver:...}


def recorded(raw: DictConfig) -> PlainConfig:
    """Return a plain config for a file of a run.

    References to other keys have their values. Of ``${oc.env:...}``, and whatever another resolver
    computes, numbers are written; texts stay as they are, for whoever reads the file. A text under
    a key like ``token``, ``key``, ``password`` or ``secret`` is left out, and references to it
    stay.
    """
    plain: Any = OmegaConf.to_container(raw, resolve=False)
    found: PlainConfig = _record(plain, OmegaConf.to_container(raw, resolve=True), plain)
    return found


def secret_keys(raw: DictConfig) -> list[str]:
    """Return the dotted keys that :func:`recorded` leaves out."""
    return list(_secrets(OmegaConf.to_container(raw, resolve=False), ""))


def without_secrets(plain: PlainConfig) -> tuple[PlainConfig, list[str]]:
    """Return a plain config for others, without texts under keys of secrets, and those keys.

    References to the environment are left out there too: nobody else has that variable. Elsewhere
    texts are left out that contain the tokens of usual services.
    """
    return _public(plain), list(_secrets(plain, "", is_secret=_may_be_others_secret))


def looks_secret(text: str) -> bool:
    """Whether a text contains a token of a usual service, or a password in an address."""
    return _SECRET_VALUE.search(text) is not None


def _public(node: object) -> Any:
    if isinstance(node, dict):
        return {k: _public(v) for k, v in node.items() if not _may_be_others_secret(k, v)}
    return [_public(item) for item in node] if isinstance(node, list) else node


def _record(node: object, value: Any, plain: PlainConfig) -> Any:
    """Record a node, whose resolved value is ``value``, of the config ``plain``."""
    if isinstance(node, dict):
        found = {key: _record(item, value[key], plain) for key, item in node.items()}
        return {key: item for key, item in found.items() if not _is_secret(key, item)}
    if isinstance(node, list):
        return [_record(*pair, plain) for pair in zip(node, value, strict=True)]
    if not isinstance(node, str):
        return node
    if not isinstance(value, str | list | dict):
        return value
    whole = _REFERENCE.fullmatch(node)
    if whole:
        return _follow(whole, value, plain)
    return _REFERENCE.sub(lambda match: str(_follow(match, "", plain)), node)


def _follow(reference: re.Match[str], value: object, plain: PlainConfig) -> Any:
    """What a reference stands for; the reference itself if that is secret or in a list."""
    node = plain
    for part in reference[1].split("."):
        if not isinstance(node, dict) or part not in node or _is_secret(part, node[part]):
            return reference[0]
        node = node[part]
    return _record(node, value, plain)


def _may_be_secret(key: object, value: object) -> bool:
    return isinstance(value, str) and bool(value) and bool(_SECRET.fullmatch(str(key)))


def _may_be_others_secret(key: object, value: object) -> bool:
    return _may_be_secret(key, value) or (isinstance(value, str) and looks_secret(value))


def _is_secret(key: Any, value: Any) -> bool:
    """Whether a text is the secret itself, and no reference to it."""
    return _may_be_secret(key, value) and not value.startswith("${")


def _secrets(
    node: object, path: str, is_secret: Callable[[object, object], bool] = _is_secret
) -> Iterator[str]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _secrets(item, f"{path}[{index}]", is_secret)
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{path}.{key}" if path else str(key)
            if is_secret(key, value):
                yield place
            yield from _secrets(value, place, is_secret)
