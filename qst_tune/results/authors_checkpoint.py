"""Side networks of the authors' code (github.com/YouAreSpecialToMe/QST at 27cef0a).

Their ``save_qst_state`` writes a directory of pickled state dicts with Hugging Face names and
without any configuration. They are read with ``weights_only``: a pickle that wants to run code is
refused.

A classifier's directory also has its head, and the output gate under another name. Their code fails
before it writes that gate (LLaMA: ``torch.save`` gets no tensor; OPT: it is given ``lm_head_z``,
which a classifier lacks), and its loading asks for the file all the same.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchtune.models import convert_weights
from torchtune.models.convert_weights import get_mapped_key

from qst_tune.atomic_files import write_directory
from qst_tune.errors import UserError

Weights = dict[str, torch.Tensor]
Family = Literal["llama", "opt"]
Gate = Literal["lm_head_z", "score_z"]  # of a language model, of a classifier

BLOCKS_FILE = "qst_layers_parameters.pt"
SCORE_FILE = "qst_score_parameters.pt"


@dataclass(frozen=True)
class _Layout:
    """What differs between the authors' files for two families of backbones."""

    prefix: str  # before the names of what belongs to their decoder
    norm: dict[str, str]  # their names -> ours
    gate_suffix: str  # of the file with the output gate

    def files(self, gate: Gate) -> dict[str, str]:
        """Name of a file -> prefix of its keys in the authors' model."""
        files = {
            BLOCKS_FILE: f"{self.prefix}qst_layers.",
            "qst_z_parameters.pt": f"{self.prefix}z.",
            "qst_downsample_parameters.pt": f"{self.prefix}downsample.",
            "qst_norm_parameters.pt": f"{self.prefix}{next(iter(self.norm)).partition('.')[0]}.",
            "qst_upsample_parameters.pt": "upsample.",
        }
        if gate == "score_z":
            files[SCORE_FILE] = "score."
        return {**files, self.gate_file(gate): gate}

    def gate_file(self, gate: Gate) -> str:
        """Name of the file with the output gate."""
        return gate + self.gate_suffix

    def names(self, gate: Gate) -> dict[str, str]:
        """The authors' names without the prefix -> ours, for everything but the side blocks."""
        return {**_SHARED_NAMES, **self.norm, gate: "output_mix.logit"}


# ``{}`` is the number of a layer.
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
# Modules of OPT's layer -> those of torchtune's layer; it has no rotary embedding to permute for.
_OPT_LAYER = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.out_proj": "attn.output_proj",
    "self_attn_layer_norm": "sa_norm",
    "fc1": "mlp.w1",
    "fc2": "mlp.w2",
    "final_layer_norm": "mlp_norm",
}
_OPT_NAMES = {
    f"layers.{{}}.{theirs}.{leaf}": f"layers.{{}}.{ours}.{leaf}"
    for theirs, ours in _OPT_LAYER.items()
    for leaf in ("weight", "bias")
}
_LAYOUTS: dict[Family, _Layout] = {
    "llama": _Layout("model.", {"norm_qst.weight": "norm.scale"}, "_path.pt"),
    "opt": _Layout(
        "model.decoder.",
        {
            "final_layer_norm_qst.weight": "norm.weight",
            "final_layer_norm_qst.bias": "norm.bias",
        },
        "_parameters.pt",
    ),
}
_OUTSIDE = ("upsample.", "score", "lm_head_z")  # outside their decoder


def read_authors_directory(directory: Path, *, classifier: bool = False) -> Weights:
    """Read a directory of the authors' LLaMA or OPT code, by the parameter names of their model.

    It has the six files of ``save_qst_state``; a classifier's has seven, or six without the output
    gate, and then there is no ``score_z``. UserError if a file is missing or is not a plain state
    dict, or it is a classifier's and none was asked for.
    """
    gate: Gate = "score_z" if classifier else "lm_head_z"
    blocks = _load_tensors(directory / BLOCKS_FILE, f"{BLOCKS_FILE} and others")
    layout = _LAYOUTS["opt" if any(".fc1." in name for name in blocks) else "llama"]
    has_gate = (directory / layout.gate_file(gate)).exists()
    if not classifier and not has_gate and (directory / SCORE_FILE).exists():
        raise UserError(
            f"{directory} is a classifier's, it has {SCORE_FILE}: name a config whose model is "
            "qst_tune.models.qst_classifier"
        )
    files = layout.files(gate)
    state: Weights = {}
    for name, prefix in files.items():
        if prefix == "score_z" and not has_gate:
            continue
        content = (
            blocks if name == BLOCKS_FILE else _load_tensors(directory / name, ", ".join(files))
        )
        state.update({prefix + key: value.detach() for key, value in content.items()})
    return state


def side_from_authors(state: Weights, *, num_heads: int, num_kv_heads: int) -> Weights:
    """Rename the authors' parameters to those of ``qst_decoder(..., variant="authors").side``.

    Over LLaMA, rows of the query and key projections are permuted from transformers' half-split
    rotary embeddings to torchtune's interleaved ones. The numbers of heads are the side blocks'.
    """
    family = family_of(state)
    layout = _LAYOUTS[family]
    names = layout.names(_gate_of(state))
    blocks_prefix = f"{layout.prefix}qst_layers."
    blocks = {
        f"layers.{name.removeprefix(blocks_prefix)}": value
        for name, value in state.items()
        if name.startswith(blocks_prefix)
    }
    if family == "opt":
        converted = {get_mapped_key(n, _OPT_NAMES): value for n, value in blocks.items()}
    else:
        converted = convert_weights.hf_to_tune(
            {f"model.{name}": value for name, value in blocks.items()},
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            dim=state["upsample.weight"].shape[1],
        )
    side = {name.replace("layers.", "blocks.", 1): value for name, value in converted.items()}
    for name, value in state.items():
        if not name.startswith(blocks_prefix):
            side[get_mapped_key(name.removeprefix(layout.prefix), names)] = value
    return side


def side_to_authors(side: Weights, family: Family, *, num_heads: int, num_kv_heads: int) -> Weights:
    """Rename the other way; the inverse of :func:`side_from_authors`."""
    layout = _LAYOUTS[family]
    names = {ours: theirs for theirs, ours in layout.names(_gate_of(side)).items()}
    blocks = {
        name.replace("blocks.", "layers.", 1): value
        for name, value in side.items()
        if name.startswith("blocks.")
    }
    if family == "opt":
        names_of_opt = {ours: theirs for theirs, ours in _OPT_NAMES.items()}
        converted = {
            f"{layout.prefix}{get_mapped_key(n, names_of_opt)}": v for n, v in blocks.items()
        }
    else:
        converted = convert_weights.tune_to_hf(
            blocks,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            dim=side["upsample.weight"].shape[1],
        )
    state = {name.replace("layers.", "qst_layers.", 1): value for name, value in converted.items()}
    for name, value in side.items():
        if not name.startswith("blocks."):
            theirs = get_mapped_key(name, names)
            inside = not theirs.startswith(_OUTSIDE)
            state[layout.prefix + theirs if inside else theirs] = value
    return state


def write_authors_directory(directory: Path, state: Weights) -> None:
    """Write the files that the authors' code loads, six or a classifier's seven, or none at all.

    An existing directory is replaced. UserError if it cannot be written.
    """
    files: dict[str, bytes] = {}
    for name, prefix in _LAYOUTS[family_of(state)].files(_gate_of(state)).items():
        content: Any = {
            # A clone: torch.save would write all that a view is a part of.
            key.removeprefix(prefix): value.detach().clone()
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if prefix in state:  # their output gate is no state dict but the parameter itself
            content = nn.Parameter(content.pop(""))
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
    content: Any
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: a directory of the authors' code has {files}"
        ) from None
    except Exception as error:  # torch.load raises many types for a damaged or hostile file
        reason = str(error).split(". ")[0].split("\n")[0]
        raise UserError(f"{path} is not a plain state dict and was not loaded: {reason}") from error
    tensors: Weights = content if isinstance(content, dict) else {"": content}
    if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
        raise UserError(f"{path} is not a plain state dict: it has more than tensors")
    return tensors
