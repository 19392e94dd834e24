"""LoRA in the last layers as an adapter of PEFT's, which PEFT, vLLM and transformers read.

It is a directory ``peft`` in that of a result, since transformers would take an
``adapter_config.json`` in the result's own directory for the whole model.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import nn
from torchtune.models.convert_weights import (
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RotaryPositionalEmbeddings

from qst_tune.backbone.experts import ExpertLinears
from qst_tune.backbone.hub import is_hub_name
from qst_tune.backbone.transformers import TransformersBackbone, transformers_backbone
from qst_tune.errors import UserError
from qst_tune.json_files import read_json
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.config import SideConfig
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.results.tuned_directory import CARD_FILE, Tensors, check_finite

CONFIG_FILE = "peft/adapter_config.json"
WEIGHTS_FILE = "peft/adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)

_NAMES_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_PREFIX = "base_model.model."  # before a module's name in transformers' model
# torchtune's conversion reorders queries and keys for these.
_INTERLEAVED = (RotaryPositionalEmbeddings, Llama3ScaledRoPE)


class NoAdapterError(ValueError):
    """PEFT cannot compute what a result computes; the message says why."""


def add_peft(files: Mapping[str, bytes], model: QSTModel, base_model: str) -> dict[str, bytes]:
    """Add PEFT's adapter to the files of a result, or to its card why there is none.

    ``model`` gives names and may be on meta or sharded; the tensors are those of ``files``.
    ``base_model`` is the backbone's directory or its name on the hub. A result without LoRA stays
    as it is.
    """
    if model.side.lora is None:
        return dict(files)
    try:
        tensors = load(files[SIDE_NETWORK.weights_file])
        added = adapter_files(model, tensors, base_model)
        note = "`peft/` has the same LoRA as an adapter in the format of PEFT, for other programs"
    except NoAdapterError as reason:
        added, note = {}, f"there is no adapter for PEFT: {reason}"
    card = files[CARD_FILE] + f"\n**PEFT**: {note}.\n".encode()
    return {**files, CARD_FILE: card, **added}


def adapter_files(
    model: QSTModel, tensors: Mapping[str, torch.Tensor], base_model: str
) -> dict[str, bytes]:
    """Write an adapter's two files, by path.

    ``tensors`` are those of a result, ``lora.<layer>.<linear>.a`` ``[r, I]`` and ``.b`` ``[O, r]``.
    NoAdapterError if the result is more than LoRA, or PEFT has no name for a linear.
    """
    if model.side.layers:
        raise NoAdapterError(
            "its format has no place for a side network; num_side_blocks=0 would train LoRA alone"
        )
    if isinstance(model, QSTClassifier):
        raise NoAdapterError("a classifier's head is not one of its layers' linears")
    is_own = transformers_backbone(model) is not None
    settings, weights = (_of_transformers if is_own else _of_torchtune)(model, tensors)
    config = {**_settings(model.side.config, base_model), **settings}
    plain = {name: value.contiguous() for name, value in weights.items()}
    return {
        CONFIG_FILE: _json(config),
        WEIGHTS_FILE: save(plain, metadata={"format": "pt"}),
    }


def public_files(directory: Path, base_model: str) -> dict[str, bytes]:
    """Read the adapter of a result, if it has one, for a base model of another name.

    UserError if it is damaged.
    """
    if not (directory / CONFIG_FILE).exists():
        return {}
    config = {**read_json(directory / CONFIG_FILE), **_base_model(base_model)}
    _read_weights(directory)
    weights = (directory / WEIGHTS_FILE).read_bytes()
    return {CONFIG_FILE: _json(config), WEIGHTS_FILE: weights}


def check_adapter(directory: Path, model: QSTModel, tensors: Tensors) -> None:
    """Compare the adapter of a result, if it has one, with its tensors; UserError if they differ.

    ``model`` may be on meta.
    """
    if not (directory / CONFIG_FILE).exists():
        return
    try:
        files = adapter_files(model, tensors, "")
    except NoAdapterError as error:
        raise UserError(f"{directory / CONFIG_FILE} should not be there: {error}") from error
    wanted, found = load(files[WEIGHTS_FILE]), _read_weights(directory)
    settings = {**read_json(directory / CONFIG_FILE), **_base_model("")}
    is_same = settings == json.loads(files[CONFIG_FILE]) and found.keys() == wanted.keys()
    if not is_same or not all(torch.equal(found[n], wanted[n]) for n in wanted):
        raise UserError(
            f"{directory / 'peft'} is not what {SIDE_NETWORK.weights_file} beside it has: copy the "
            "whole directory again, or remove its peft"
        )


def _read_weights(directory: Path) -> Tensors:
    path = directory / WEIGHTS_FILE
    try:
        tensors: Tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): copy it again") from error
    check_finite(path, tensors)
    return tensors


def _json(config: Mapping[str, object]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _base_model(base_model: str) -> dict[str, str | None]:
    """A base model as an adapter's configuration names it; its commit is apart."""
    name, _, revision = base_model.partition("@" if is_hub_name(base_model) else "\n")
    return {"base_model_name_or_path": name, "revision": revision or None}


def _settings(config: SideConfig, base_model: str) -> dict[str, object]:
    alpha = config.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_base_model(base_model),
        "inference_mode": True,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.lora_rank_stabilized,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _of_torchtune(
    model: QSTModel, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, object], Tensors]:
    """By torchtune's own conversion, which is for decoders with LLaMA's names and rotary pairs."""
    attention = model.layers[0].attn
    kind = type(attention.pos_embeddings)
    if kind not in _INTERLEAVED:
        raise NoAdapterError(f"torchtune has no conversion for a decoder with {kind.__name__}")
    named = {
        f"layers.{index}.{path}.lora_{leaf}.weight": value
        for index, path, leaf, value in _parts(tensors)
    }
    sizes = {name: getattr(attention, name) for name in ("num_heads", "num_kv_heads", "head_dim")}
    targets = sorted({_last(path) for _, path in _linears(model)})
    wanted = {"target_modules": targets, "r": 0, "lora_alpha": 0}
    try:
        targets = tune_to_peft_adapter_config(wanted)["target_modules"]
        weights = tune_to_peft_adapter_weights(named, **sizes)
    except Exception as error:  # torchtune's is a bare one
        raise NoAdapterError("torchtune's conversion has no name for a linear of it") from error
    return {"target_modules": targets, **_layers_of(model, "layers")}, weights


def _of_transformers(
    model: QSTModel, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, object], Tensors]:
    backbone: Any = model.backbone
    modules = dict(backbone.model.named_modules())
    home = next(name for name, module in modules.items() if module is backbone.layers)
    if any(isinstance(modules[f"{home}.{path}"], ExpertLinears) for path in _owners(model)):
        raise NoAdapterError("the LoRA of its experts has no name there")
    _check_names(backbone, {_last(path) for _, path in _linears(model)})
    linears = [type(modules[f"{home}.{index}.{path}"]).__name__ for index, path in _linears(model)]
    settings = {
        "target_modules": _targets(model),
        **_layers_of(model, home.partition(".")[2] or home),
        "fan_in_fan_out": "Conv1D" in linears,
    }
    return settings, {
        f"{_PREFIX}{home}.{index}.{path}.lora_{leaf.upper()}.weight": value
        for index, path, leaf, value in _parts(tensors)
    }


def _check_names(backbone: TransformersBackbone, names: set[str]) -> None:
    """Refuse linears that PEFT 0.21 does not load as what they are, by their names."""
    layers = backbone.layers
    has_experts = any(p.ndim == 3 and "expert" in n for n, p in layers.named_parameters())
    has_experts = has_experts or any(isinstance(m, ExpertLinears) for m in layers.modules())
    if has_experts and names & _NAMES_OF_EXPERTS:
        raise NoAdapterError(
            f"it takes {', '.join(sorted(names & _NAMES_OF_EXPERTS))} of a mixture of experts for "
            "the experts'; apply_lora_to_mlp=False leaves them out"
        )
    if backbone.config.model_type in _MAMBAS and "out_proj" in names:
        raise NoAdapterError("it refuses the out_proj of Mamba's layers")


def _parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, str, str, torch.Tensor]]:
    """Layer, path in it, "a" or "b", and the tensor of each name of a result."""
    for name, value in tensors.items():
        _, index, *path, leaf = name.split(".")
        yield int(index), ".".join(path), leaf, value


def _linears(model: QSTModel) -> Iterator[tuple[int, str]]:
    """Layer and path in it of each linear that has LoRA."""
    lora: Any = model.side.lora
    for index in range(lora.first, len(model.layers)):
        yield from ((index, path) for path in lora.pairs(index))


def _owners(model: QSTModel) -> set[str]:
    """Paths, from the layers on, of all modules that contain one of those linears."""
    found = set()
    for index, path in _linears(model):
        parts = path.split(".")
        found |= {".".join([str(index), *parts[:end]]) for end in range(1, len(parts))}
    return found


def _layers_of(model: QSTModel, pattern: str) -> dict[str, object]:
    """The layers with LoRA; ``pattern`` is how their names begin, less the part that PEFT skips."""
    layers = sorted({index for index, _ in _linears(model)})
    return {"layers_to_transform": layers, "layers_pattern": pattern}


def _targets(model: QSTModel) -> list[str]:
    """Names of the linears with LoRA, or their paths where a name would match others too.

    PEFT matches what a module's name ends with, in each layer with LoRA.
    """
    chosen: dict[int, set[str]] = {}
    for index, path in _linears(model):
        chosen.setdefault(index, set()).add(path)
    for shortened in (_last, str):
        targets = {shortened(path) for paths in chosen.values() for path in paths}
        if all(_matched(model.layers[i], targets) == paths for i, paths in chosen.items()):
            return sorted(targets)
    raise NoAdapterError("its layers have linears of one name with LoRA and without")


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _matched(layer: nn.Module, targets: Collection[str]) -> set[str]:
    ends = tuple(f".{target}" for target in targets)
    return {path for path, _ in layer.named_modules() if f".{path}".endswith(ends)}
