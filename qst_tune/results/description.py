"""What the directory of a result says of its tensors: one typed reader, and the writer.

A directory may be anyone's. Types, ranges and texts are checked here, before anything is built from
the description or printed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qst_tune import __version__
from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError, os_errors
from qst_tune.json_files import read_json
from qst_tune.modules.side.config import SideConfig
from qst_tune.modules.side.network import SideNetwork

FORMAT_VERSION = 2  # 1 had no structure
MAX_BYTES = 1 << 20  # of the file; a description has a few thousand
MAX_DEPTH = 8

ModelBlock = dict[str, Any]  # a config's ``model`` block: arguments of any builder


@dataclass(frozen=True)
class TunedFormat:
    """How a method names the files of its directory; ``title`` is for people: "QST side network".

    ``origin`` is which recipe writes it, and where to.
    """

    method: Literal["qst", "peqa"]
    title: str
    weights_file: str
    config_file: str
    origin: str


SIDE_NETWORK = TunedFormat(
    method="qst",
    title="QST side network",
    weights_file="side_network.safetensors",
    config_file="qst_config.json",
    origin="qst_finetune wrote (<output_dir>/side_network)",
)
SCALES = TunedFormat(
    method="peqa",
    title="set of PEQA scales",
    weights_file="scales.safetensors",
    config_file="peqa_config.json",
    origin="peqa_finetune wrote (<output_dir>/scales)",
)
# Key of a config, which is also the directory's name in a run's output_dir.
FORMATS = {"side_network": SIDE_NETWORK, "scales": SCALES}


@dataclass(frozen=True)
class Ancestor:
    """A result that a run started from: its name, the SHA-256 of its tensors, its steps, data."""

    name: str
    digest: str
    steps: float | None = None
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class SideStructure:
    """What a side network computes: its resolved configuration, and what follows from it."""

    config: SideConfig
    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    num_layers: int = 0  # N; 0 in results of 0.1

    @classmethod
    def of(cls, side: SideNetwork) -> "SideStructure":
        """Describe a side network, perhaps on meta."""
        lora = side.lora
        num_layers = max(side.layers) + 1 if lora is None else lora.first + len(lora)
        if not side.layers:
            return cls(side.config, (), 0, 0, num_layers)
        attn: Any = side.blocks[0].attn
        heads = (attn.num_heads, attn.num_kv_heads)
        return cls(side.config, tuple(side.layers), *heads, num_layers)

    @property
    def lora(self) -> str:
        """Where there is LoRA, for people, such as "LoRA in the last 8 of 30 layers"; or ""."""
        count, total = self.config.lora_layers, self.num_layers
        if not count:
            return ""
        which = f"all {total}" if count == total else f"the last {count} of {total}"
        return f"LoRA in {which} layers"

    def differences(
        self, other: "SideStructure", words: tuple[str, str] = ("there", "here")
    ) -> list[str]:
        """List what makes two side networks with equal tensors compute otherwise.

        One head of 36 and three heads of 12, for one, have the same tensors. The rest of the
        configuration shows in the tensors, acts in training alone, or (hidden_bits) approximates
        the same function. ``words`` name the two.
        """
        ours, theirs = self._function(), other._function()
        return [
            f"{key} {ours[key]!r} {words[0]}, {value!r} {words[1]}"
            for key, value in theirs.items()
            if ours[key] != value
        ]

    def _function(self) -> dict[str, object]:
        config = self.config
        return {
            "layers": list(self.layers),
            "normalize_hidden": config.normalize_hidden,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "downsample": config.downsample,
            "activation": config.activation if config.downsample == "adapter" else None,
            "output_mix": config.output_mix,
            "lora_scale": config.lora_scale if config.lora_layers else None,
        }


@dataclass(frozen=True)
class Description:
    """The content of ``qst_config.json`` or ``peqa_config.json``.

    ``model`` is the config's block that rebuilds the model, ``results`` are figures for people,
    ``lineage`` is what it was tuned from, oldest first, ``verdict`` says that the run made the
    model no better. Only a side network has a ``structure``. ``weights_sha256`` is that
    of the file of tensors; results of 0.1 have none.
    """

    form: TunedFormat
    backbone: BackboneId
    model: ModelBlock
    structure: SideStructure | None = None
    results: Mapping[str, float] = field(default_factory=dict)
    lineage: tuple[Ancestor, ...] = ()
    verdict: str = ""
    version: str = __version__
    weights_sha256: str = ""

    @property
    def title(self) -> str:
        """What it is, for people, such as "A QST side network"."""
        lora = self.structure.lora if self.structure else ""
        if lora and self.structure and not self.structure.layers:
            return lora
        return f"A {self.form.title}" + (f" with {lora}" if lora else "")

    @property
    def has_side_network(self) -> bool:
        """Whether there is more than LoRA or scales."""
        return bool(self.structure and self.structure.layers)

    @property
    def is_classifier(self) -> bool:
        """Whether the model gives classes instead of text."""
        return "num_labels" in self.model

    def to_json(self) -> bytes:
        """Write the file."""
        structure = asdict(self.structure) if self.structure else {}
        content = {
            "method": self.form.method,
            "format_version": FORMAT_VERSION,
            "qst_tune_version": self.version,
            "backbone": self.backbone.described(),
            "model": self.model,
            "structure": {**structure.pop("config", {}), **structure},
            "weights_sha256": self.weights_sha256,
            "results": self.results,
            **({"lineage": [asdict(link) for link in self.lineage]} if self.lineage else {}),
            **({"verdict": self.verdict} if self.verdict else {}),
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def format_of(directory: Path) -> TunedFormat:
    """Find out which method wrote a directory; UserError if none did."""
    with os_errors(f"read {directory}"):
        for form in FORMATS.values():
            if (directory / form.config_file).is_file():
                return form
    raise UserError(
        f"{directory} is no result of qst_tune: it has neither "
        f"{' nor '.join(form.config_file for form in FORMATS.values())}"
    )


def read_description(directory: Path, form: TunedFormat | None = None) -> Description:
    """Read and check a directory's description, of the method that is asked for.

    UserError if it is missing, not JSON, of another method or format, or has a value that no run
    writes.
    """
    form = form or format_of(directory)
    path = directory / form.config_file
    with os_errors(f"read {directory}"):
        size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise UserError(
            f"{directory} is not a {form.title}: it has no {form.config_file}; name a directory "
            f"that {form.origin}"
        )
    if size > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes: it is no description")
    content = read_json(path)
    if content.get("method") != form.method:
        raise UserError(f"{path} does not describe a {form.title}")
    _check_format(path, content)
    try:
        _check_plain(content)
        return _parse(form, content)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; copy the directory again") from error


def _check_format(path: Path, content: Mapping[str, Any]) -> None:
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version!r}, this qst_tune {__version__} reads format "
            f"{FORMAT_VERSION}: install the qst_tune that wrote it "
            f"({content.get('qst_tune_version')})"
        )


def _parse(form: TunedFormat, content: Mapping[str, Any]) -> Description:
    model = _typed(ModelBlock, content.get("model"), "model")
    # Until 0.1 without the library, which was torchtune's or, of the same weights, any.
    backbone = {"library": "", **_typed(ModelBlock, content.get("backbone"), "backbone")}
    return Description(
        form,
        _typed(BackboneId, backbone, "backbone"),
        model,
        _structure(model, content.get("structure")) if form is SIDE_NETWORK else None,
        _typed(dict[str, float], content.get("results", {}), "results"),
        _typed(tuple[Ancestor, ...], content.get("lineage", []), "lineage"),
        _typed(str, content.get("verdict", ""), "verdict"),
        _typed(str, content.get("qst_tune_version"), "qst_tune_version"),
        _typed(str, content.get("weights_sha256", ""), "weights_sha256"),
    )


def _structure(model: ModelBlock, content: object) -> SideStructure:
    found = _typed(ModelBlock, content, "structure")
    if "reads" in found:
        # Written before a directory had the whole configuration; its model block has what differs.
        if found["reads"] != "output":
            raise ValueError("it reads the input of layers, which this version does not")
        config = asdict(_typed(SideConfig, model, "model").resolved(1, 1))
        mix = _typed(str, found.get("output_mix"), "structure.output_mix")
        swapped = {"output_mix": "swapped_sigmoid"} if "swapped" in mix else {}
        both = {"downsample", "output_mix"}
        found = {**config, **{k: v for k, v in found.items() if k not in both}, **swapped}
    config = _typed(SideConfig, found, "structure")
    structure: SideStructure = _typed(SideStructure, {**found, "config": config}, "structure")
    return structure


def _check_plain(node: object, where: str = "", depth: int = 0) -> None:
    """Refuse texts that would forge a terminal's lines, and numbers that no tensor's size is."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(node, str) and not node.isprintable():
        raise ValueError(f"{where} has control characters")
    if isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{where} is {node}, which is not finite")
    if isinstance(node, int) and abs(node) >= 1 << 63:
        raise ValueError(f"{where} is an integer of more than 64 bits")
    for key, value in _children(node):
        if not str(key).isprintable():
            raise ValueError(f"{where or 'it'} has a name with control characters")
        _check_plain(value, f"{where}.{key}" if where else str(key), depth + 1)


def _children(node: object) -> Iterator[tuple[object, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def _typed(kind: object, value: object, where: str) -> Any:
    """Take a value of JSON as ``kind``: a plain type, a generic of those, or a dataclass of them.

    Keys that a dataclass does not have are those of a later version, and left out. ValueError for
    another type.
    """
    taken = value
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        names = [f.name for f in fields(kind) if f.name in value]
        try:
            taken = kind(**{n: _typed(hints[n], value[n], f"{where}.{n}") for n in names})
        except TypeError as error:  # a field without a default
            raise ValueError(f"{where} lacks{str(error).rpartition(':')[2]}") from None
    elif get_origin(kind) is tuple and isinstance(value, list | tuple):
        taken = tuple(_typed(get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif get_origin(kind) is dict and isinstance(value, dict):
        taken = {k: _typed(get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    elif not _is_of(kind, value):
        raise ValueError(f"{where} is {value!r:.60} and must be {_words(kind)}")
    return taken


def _words(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    names = {dict: "an object", tuple: "a list", str: "a text", int: "an integer", bool: "a bool"}
    names |= {float: "a number", type(None): "null"}
    return names.get(origin, "an object")


def _is_of(kind: object, value: object) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(one, value) for one in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
