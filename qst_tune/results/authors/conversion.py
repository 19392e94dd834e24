"""Between directories of the authors' code and ours: shapes inferred, and checked on both sides."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import utils
from torchtune.modules import RMSNorm

from qst_tune.backbone.side_blocks import is_opt, text_sizes
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.errors import UserError
from qst_tune.models.build import build_on_meta
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.config import SideConfig
from qst_tune.results.authors.checkpoint import (
    Family,
    Weights,
    read_authors_directory,
    side_from_authors,
    side_to_authors,
)
from qst_tune.results.description import SIDE_NETWORK, ModelBlock, SideStructure, read_description
from qst_tune.results.tuned_directory import read_tensors

_CLASSIFIER = "num_labels"  # the argument of a model block that makes it a classifier's

log = utils.get_logger("INFO")


def import_authors(directory: Path, model_block: DictConfig) -> tuple[QSTModel, ModelBlock]:
    """Read a directory of the authors' code as the side network of a config's backbone.

    It has no configuration: r, the rank and a classifier's number of labels are those that give its
    tensors' shapes over the config's backbone, and the heads are the backbone's, as in their code.
    A classifier's output gate that their code failed to write gets its initial value; on a GPU
    their code never trains it.

    ``model_block`` builds a QST model, a classifier for a classifier's directory; settings of its
    side network are replaced. Returns the model, its backbone on meta, and the ``model`` block that
    builds it. UserError if a file is missing or no plain state dict, or the tensors are not those
    of a side network over this backbone.
    """
    block = _backbone_part(model_block)
    is_classifier = _CLASSIFIER in model_block
    state = read_authors_directory(directory, classifier=is_classifier)
    embed_dim, side_dim = _shape(directory, state, "upsample.weight")
    rank = _shape(directory, state, "downsample.0.adapter_A.weight")[0]
    block |= {"variant": "authors", "rank": rank}
    if is_classifier:
        block[_CLASSIFIER] = _shape(directory, state, "score.weight")[0]
    full_width = _build({**block, "reduction_factor": 1})
    _check_backbone(directory, state, full_width, embed_dim)
    _start_missing_gate(directory, state, full_width)
    problem = f"their side network has width {side_dim}"
    for reduction_factor in range(embed_dim // side_dim, 0, -1):
        if embed_dim // reduction_factor != side_dim:
            break
        candidate = {**block, "reduction_factor": reduction_factor}
        model = _build(candidate)
        side = _converted(directory, state, model)
        problem = _difference(side, model)  # the MLP's width decides between several r
        if not problem:
            model.side.load_state_dict(side, assign=True)
            return model, candidate
    raise UserError(
        f"{directory} has shapes that no reduction_factor gives over {block['_component_']}: "
        f"{problem}"
    )


def export_authors(directory: Path, model_block: DictConfig) -> tuple[Weights, ModelBlock]:
    """Read one of our directories, of ``variant="authors"``, as tensors of the authors' code.

    ``model_block`` builds a QST model over its backbone; the builder that the directory names is
    not called. Also returns what their configuration must have to load the tensors. UserError if
    the directory is damaged, or their code cannot compute what it contains.
    """
    block = _backbone_part(model_block)
    description = read_description(directory, SIDE_NETWORK)
    found = description.structure
    assert found is not None  # a side network's has one
    if (_CLASSIFIER in model_block) != description.is_classifier:
        kind = "a classifier's" if description.is_classifier else "a language model's"
        raise UserError(
            f"{directory} is {kind}, and the config's model is not: name its own config"
        )
    if found.lora:
        raise UserError(f"{directory} has {found.lora}, which the authors' code does not compute")
    labels = {n: v for n, v in description.model.items() if n == _CLASSIFIER}
    sizes = {"reduction_factor": found.config.reduction_factor, "rank": found.config.rank}
    model = _build({**block, **sizes, **labels, "variant": "authors"})
    side = read_tensors(directory, SIDE_NETWORK)
    words = ("in it", "in theirs")
    problem = (
        "; ".join(found.differences(SideStructure.of(model.side), words))
        or _difference(side, model)
        or _other_heads(model)
    )
    if problem:
        raise UserError(f"{directory} is nothing that the authors' code computes: {problem}")
    state = side_to_authors(side, _family(model), **_heads(model.side.blocks))
    settings = {"r": sizes["reduction_factor"], "peft_hidden_size": sizes["rank"], **labels}
    return state, settings | {"activation": "swish", "add_layer_norm_after_adapter": True}


def _backbone_part(model_block: DictConfig) -> ModelBlock:
    """The config's model block without a side network's settings."""
    block = OmegaConf.to_container(model_block, resolve=True)
    of_side = {field.name for field in fields(SideConfig)} | {_CLASSIFIER}
    assert isinstance(block, dict)
    return {str(name): value for name, value in block.items() if name not in of_side}


def _shape(directory: Path, state: Weights, suffix: str) -> tuple[int, int]:
    """Shape of the matrix whose name ends so."""
    shape = next((tuple(v.shape) for name, v in state.items() if name.endswith(suffix)), None)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = "absent" if shape is None else f"of shape {shape}"
        raise UserError(f"{directory} is no side network of the authors' code: {suffix} is {found}")
    return shape


def _build(block: ModelBlock) -> QSTModel:
    model = build_on_meta(OmegaConf.create(block), torch.float32)
    _family(model)
    return model


def _family(model: QSTModel) -> Family:
    """Which of the authors' two models has these layers; others may fit without computing alike."""
    if isinstance(model, QSTTransformer):
        if is_opt(model.backbone.config):
            return "opt"
        raise UserError(
            "the authors' code is for LLaMA and OPT: name LLaMA by a builder of its size, such as "
            "qst_tune.models.qst_llama2_7b, and OPT by qst_tune.models.qst_from_hf (found "
            f"model_type={model.backbone.config.model_type})"
        )
    layer: Any = model.layers[0]
    is_llama = type(layer.sa_norm) is RMSNorm and isinstance(layer.mlp.activation, nn.SiLU)
    if is_llama and layer.attn.q_proj.bias is None:
        return "llama"
    raise UserError("the authors' code is for LLaMA and OPT; the config's model is neither")


def _heads(layers: Any) -> dict[str, int]:
    attn = layers[0].attn
    return {"num_heads": attn.num_heads, "num_kv_heads": attn.num_kv_heads}


def _backbone_heads(model: QSTModel) -> dict[str, int]:
    if not isinstance(model, QSTTransformer):
        return _heads(model.layers)
    sizes = text_sizes(model.backbone.config)
    return {"num_heads": sizes.num_heads, "num_kv_heads": sizes.num_kv_heads}


def _check_backbone(directory: Path, state: Weights, model: QSTModel, embed_dim: int) -> None:
    num_layers = sum(name.endswith(".adapter_A.weight") for name in state)
    here = (model.backbone.num_layers, model.backbone.width)
    if (num_layers, embed_dim) != here:
        raise UserError(
            f"{directory} is for a backbone of {num_layers} layers of width {embed_dim}, the "
            f"config's has {here[0]} of width {here[1]}: name the backbone that it was trained on"
        )


def _start_missing_gate(directory: Path, state: Weights, model: QSTModel) -> None:
    mix: Any = model.side.output_mix
    if "score.weight" in state and "score_z" not in state:
        state["score_z"] = torch.full((len(state["upsample.weight"]),), mix.initial_logit)
        log.warning(
            f"{directory} has no score_z, which their code fails to write: taking its start "
            f"{mix.initial_logit:g}, which training on a GPU leaves as it is"
        )


def _converted(directory: Path, state: Weights, model: QSTModel) -> Weights:
    problem = _other_heads(model)
    if problem:
        raise UserError(f"{directory} cannot be computed here: {problem}")
    try:
        return side_from_authors(state, **_heads(model.side.blocks))
    except Exception as error:  # torchtune's conversion raises a bare Exception
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory} is no side network over this backbone: {reason}") from error


def _other_heads(model: QSTModel) -> str:
    """Their code keeps the backbone's heads; ours takes fewer where they would be too narrow."""
    ours, theirs = _heads(model.side.blocks), _backbone_heads(model)
    return "" if ours == theirs else f"side blocks have {ours} here, and {theirs} there"


def _difference(side: Weights, model: QSTModel) -> str:
    """Describe how the tensors differ from the model's; empty if they do not."""
    wanted = {name: tuple(value.shape) for name, value in model.side.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in side.items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if not wrong:
        return ""
    name = wrong[0]
    return (
        f"{len(wrong)} tensors differ, for example {name} is {found.get(name, 'absent')} and not "
        f"{wanted.get(name, 'absent')}"
    )
