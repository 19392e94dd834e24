"""The tensors of their directories, under their names and under ours.

Their ``save_qst_state`` writes a directory of pickled state dicts with Hugging Face names and
without any configuration. They are read with ``weights_only``: a pickle that wants to run code is
refused.

A classifier's directory also has its head, and the output gate under another name. Their code fails
before it writes that gate (LLaMA: ``torch.save`` gets no tensor; OPT: it is given ``lm_head_z``,
which a classifier lacks), and its loading asks for the file all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torchtune.models.convert_weights import get_mapped_key

from qst_tune.atomic_files import write_directory
from qst_tune.errors import UserError

Weights = dict[str, torch.Tensor]
Family = Literal["llama", "opt"]
Gate = Literal["lm_head_z", "score_z"]  # of a language model, of a classifier

BLOCKS_FILE = "qst_layers_parameters.pt"
SCORE_FILE = "qst_score_parameters.pt"
_ROTATED = {"attn.q_proj.weight": "num_heads", "attn.k_proj.weight": "num_kv_heads"}
_OUTSIDE = ("upsample.", "score", "lm_head_z")  # of their decoder
# Modules of theirs -> ours, the same in both families; ``{}`` is the number of a layer.
_SHARED_NAMES = {
    "z.{}": "gates.{}.gamma",
    "downsample.{}.adapter_A.weight": "downsample.{}.reduce.weight",
    "downsample.{}.adapter_B.weight": "downsample.{}.expand.weight",
    "downsample.{}.post_layer_norm.weight": "downsample.{}.norm.weight",
    "downsample.{}.post_layer_norm.bias": "downsample.{}.norm.bias",
    "upsample.weight": "upsample.weight",
    "upsample.bias": "upsample.bias",
    "score.weight": "score.weight",
}


@dataclass(frozen=True)
class _Layout:
    """What differs between the authors' files for two families of backbones."""

    prefix: str  # before the names of what belongs to their decoder
    norm: Mapping[str, str]  # their names -> ours
    block: Mapping[str, str]  # of a side block: their names -> ours
    gate_suffix: str  # of the file with the output gate

    def files(self, gate: Gate) -> dict[str, str]:
        """Name of a file -> prefix of its keys in the authors' model."""
        parts = ("qst_layers", "z", "downsample", next(iter(self.norm)).partition(".")[0])
        names = (BLOCKS_FILE, "qst_z_parameters.pt", "qst_downsample_parameters.pt")
        files = dict(zip((*names, "qst_norm_parameters.pt"), parts, strict=True))
        files = {name: f"{self.prefix}{part}." for name, part in files.items()}
        files["qst_upsample_parameters.pt"] = "upsample."
        if gate == "score_z":
            files[SCORE_FILE] = "score."
        return {**files, gate + self.gate_suffix: gate}

    def names(self, gate: Gate) -> dict[str, str]:
        """The authors' names -> ours."""
        block = {f"qst_layers.{{}}.{t}": f"blocks.{{}}.{o}" for t, o in self.block.items()}
        inside = {**block, **_SHARED_NAMES, **self.norm, gate: "output_mix.logit"}
        return {
            theirs if theirs.startswith(_OUTSIDE) else self.prefix + theirs: ours
            for theirs, ours in inside.items()
        }


def _with_leaves(modules: Mapping[str, str], *leaves: str) -> dict[str, str]:
    return {f"{t}.{leaf}": f"{o}.{leaf}" for t, o in modules.items() for leaf in leaves}


_PROJECTIONS = {f"self_attn.{name}_proj": f"attn.{name}_proj" for name in "qkv"}
_LLAMA_LINEARS = {
    **_PROJECTIONS,
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_LLAMA_NORMS = {
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
_OPT_MODULES = {
    **_PROJECTIONS,
    "self_attn.out_proj": "attn.output_proj",
    "self_attn_layer_norm": "sa_norm",
    "fc1": "mlp.w1",
    "fc2": "mlp.w2",
    "final_layer_norm": "mlp_norm",
}
_LAYOUTS: dict[Family, _Layout] = {
    "llama": _Layout(
        "model.",
        {"norm_qst.weight": "norm.scale"},
        {**_with_leaves(_LLAMA_LINEARS, "weight"), **_LLAMA_NORMS},
        "_path.pt",
    ),
    "opt": _Layout(
        "model.decoder.",
        _with_leaves({"final_layer_norm_qst": "norm"}, "weight", "bias"),
        _with_leaves(_OPT_MODULES, "weight", "bias"),
        "_parameters.pt",
    ),
}


def read_authors_directory(directory: Path, *, classifier: bool = False) -> Weights:
    """Read a directory of the authors' LLaMA or OPT code, by the parameter names of their model.

    It has the six files of ``save_qst_state``; a classifier's has seven, or six without the output
    gate, and then there is no ``score_z``. UserError if a file is missing or is not a plain state
    dict, or it is a classifier's and none was asked for.
    """
    gate: Gate = "score_z" if classifier else "lm_head_z"
    blocks = _load_tensors(directory / BLOCKS_FILE, f"{BLOCKS_FILE} and others")
    layout = _LAYOUTS["opt" if any(".fc1." in name for name in blocks) else "llama"]
    files = layout.files(gate)
    has_gate = (directory / (gate + layout.gate_suffix)).exists()
    if not classifier and not has_gate and (directory / SCORE_FILE).exists():
        raise UserError(
            f"{directory} is a classifier's, it has {SCORE_FILE}: name a config whose model is "
            "qst_tune.models.qst_classifier"
        )
    state: Weights = {}
    for name, prefix in files.items():
        if prefix != "score_z" or has_gate:
            content = _load_tensors(directory / name, ", ".join(files))
            state.update({prefix + key: value.detach() for key, value in content.items()})
    return state


def side_from_authors(state: Weights, *, num_heads: int, num_kv_heads: int) -> Weights:
    """Rename the authors' parameters to those of ``qst_decoder(..., variant="authors").side``.

    Over LLaMA, rows of the query and key projections are permuted from transformers' half-split
    rotary embeddings to torchtune's interleaved ones. The numbers of heads are the side blocks'.
    """
    family = family_of(state)
    names = _LAYOUTS[family].names(_gate_of(state))
    side = {
        get_mapped_key(name, names): value
        for name, value in state.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    return _permuted(side, family, (2, -1), num_heads=num_heads, num_kv_heads=num_kv_heads)


def side_to_authors(side: Weights, family: Family, *, num_heads: int, num_kv_heads: int) -> Weights:
    """Rename the other way; the inverse of :func:`side_from_authors`."""
    names = {ours: theirs for theirs, ours in _LAYOUTS[family].names(_gate_of(side)).items()}
    side = _permuted(side, family, (-1, 2), num_heads=num_heads, num_kv_heads=num_kv_heads)
    return {get_mapped_key(name, names): value for name, value in side.items()}


def _permuted(side: Weights, family: Family, pairs: tuple[int, int], **heads: int) -> Weights:
    """Turn each head's rows, ``pairs`` halves of the head or pairs of rows; OPT rotates nothing."""
    changed = dict(side)
    for name, value in side.items():
        leaf = name.split(".", 2)[-1]
        if family == "llama" and name.startswith("blocks.") and leaf in _ROTATED:
            rows = value.unflatten(0, (heads[_ROTATED[leaf]], *pairs))
            changed[name] = rows.transpose(1, 2).flatten(0, 2)
    return changed


def write_authors_directory(directory: Path, state: Weights) -> None:
    """Write the files that the authors' code loads, six or a classifier's seven, or none at all.

    An existing directory is replaced. UserError if it cannot be written.
    """
    files: dict[str, bytes] = {}
    for name, prefix in _LAYOUTS[family_of(state)].files(_gate_of(state)).items():
        content: Weights | nn.Parameter = {
            # A clone: torch.save would write all that a view is a part of.
            key.removeprefix(prefix): value.detach().clone()
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if prefix in state:  # their output gate is no state dict but the parameter itself
            content = nn.Parameter(state[prefix].detach().clone())
        buffer = BytesIO()
        torch.save(content, buffer)
        files[name] = buffer.getvalue()
    write_directory(directory, files)


def family_of(state: Weights) -> Family:
    """Return for which of the authors' two models a state of :func:`read_authors_directory` is."""
    return "opt" if any(name.startswith("model.decoder.") for name in state) else "llama"


def _gate_of(state: Weights) -> Gate:
    """Their name of the output gate; the head of a classifier has one name, theirs and ours."""
    return "score_z" if "score.weight" in state else "lm_head_z"


def _load_tensors(path: Path, files: str) -> Weights:
    """A state dict; of a bare tensor, one whose only name is empty."""
    try:
        content: Weights | torch.Tensor = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: a directory of the authors' code has {files}"
        ) from None
    except Exception as error:  # torch.load raises many types for a damaged or hostile file
        reason = str(error).split(". ")[0].split("\n")[0]
        raise UserError(f"{path} is not a plain state dict and was not loaded: {reason}") from error
    tensors = content if isinstance(content, dict) else {"": content}
    if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
        raise UserError(f"{path} is not a plain state dict: it has more than tensors")
    return tensors
