"""Side networks of the authors' code (github.com/YouAreSpecialToMe/QST at 27cef0a).

Their ``save_qst_state`` leaves a folder of pickled state dicts with Hugging Face names and without
any configuration. They are read with ``weights_only``: a pickle that wants to run code is refused.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchtune.models import convert_weights
from torchtune.models.convert_weights import get_mapped_key

from qst_tune.errors import UserError
from qst_tune.models.opt_weights import opt_hf_to_tune, opt_tune_to_hf
from qst_tune.training.atomic_folder import write_folder

Family = Literal["llama", "opt"]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Layout:
    """What differs between the authors' files for two families of backbones."""

    prefix: str  # before the names of what belongs to their decoder
    norm: dict[str, str]  # their names -> ours
    output_gate_file: str

    @property
    def files(self) -> dict[str, str]:
        """File of the folder -> prefix of its keys in the authors' model."""
        return {
            "qst_layers_parameters.pt": f"{self.prefix}qst_layers.",
            "qst_z_parameters.pt": f"{self.prefix}z.",
            "qst_downsample_parameters.pt": f"{self.prefix}downsample.",
            "qst_norm_parameters.pt": f"{self.prefix}{next(iter(self.norm)).partition('.')[0]}.",
            "qst_upsample_parameters.pt": "upsample.",
            self.output_gate_file: "lm_head_z",
        }

    @property
    def names(self) -> dict[str, str]:
        """The authors' names without the prefix -> ours, for everything but the side blocks."""
        return {**_SHARED_NAMES, **self.norm}


# ``{}`` stands for the number of a layer.
_SHARED_NAMES = {
    "z.{}": "gates.{}.gamma",
    "downsample.{}.adapter_A.weight": "downsample.{}.reduce.weight",
    "downsample.{}.adapter_B.weight": "downsample.{}.expand.weight",
    "downsample.{}.post_layer_norm.weight": "downsample.{}.norm.weight",
    "downsample.{}.post_layer_norm.bias": "downsample.{}.norm.bias",
    "upsample.weight": "upsample.weight",
    "upsample.bias": "upsample.bias",
    "lm_head_z": "output_mix.logit",
}
_LAYOUTS: dict[Family, _Layout] = {
    "llama": _Layout("model.", {"norm_qst.weight": "norm.scale"}, "lm_head_z_path.pt"),
    "opt": _Layout(
        "model.decoder.",
        {
            "final_layer_norm_qst.weight": "norm.weight",
            "final_layer_norm_qst.bias": "norm.bias",
        },
        "lm_head_z_parameters.pt",
    ),
}
_OUTSIDE = ("upsample.", "lm_head_z")  # stand beside their decoder, not in it


def read_authors_folder(folder: Path) -> Weights:
    """Read a folder of the authors' LLaMA or OPT code.

    Args:
        folder (Path): holds the six files of ``save_qst_state``.

    Returns:
        Weights: tensors under the parameter names of the authors' model.

    Raises:
        UserError: if a file is missing or is not a plain state dict.
    """
    is_opt = (folder / _LAYOUTS["opt"].output_gate_file).exists()
    files = _LAYOUTS["opt" if is_opt else "llama"].files
    state: Weights = {}
    for name, prefix in files.items():
        content = _load_tensors(folder / name, files)
        if isinstance(content, torch.Tensor):
            state[prefix] = content.detach()
        else:
            state.update({prefix + key: value.detach() for key, value in content.items()})
    return state


def side_from_authors(state: Weights, *, num_heads: int, num_kv_heads: int) -> Weights:
    """Rename the authors' parameters to those of ``qst_decoder(..., variant="authors").side``.

    Over LLaMA, rows of the query and key projections are permuted from transformers' half-split
    rotary embeddings to torchtune's interleaved ones.

    Args:
        state (Weights): from :func:`read_authors_folder`.
        num_heads (int): query heads of the side blocks (the backbone's own number).
        num_kv_heads (int): key and value heads of the side blocks.

    Returns:
        Weights: a state dict for the side network.
    """
    family = family_of(state)
    layout = _LAYOUTS[family]
    blocks_prefix = f"{layout.prefix}qst_layers."
    blocks = {
        f"layers.{name.removeprefix(blocks_prefix)}": value
        for name, value in state.items()
        if name.startswith(blocks_prefix)
    }
    if family == "opt":
        converted = opt_hf_to_tune(blocks)
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
            side[get_mapped_key(name.removeprefix(layout.prefix), layout.names)] = value
    return side


def side_to_authors(side: Weights, family: Family, *, num_heads: int, num_kv_heads: int) -> Weights:
    """Rename the other way; the inverse of :func:`side_from_authors`.

    Args:
        side (Weights): state dict of a side network of ``variant="authors"``.
        family (Family): "llama" or "opt", the family of the backbone.
        num_heads (int): query heads of the side blocks.
        num_kv_heads (int): key and value heads of the side blocks.

    Returns:
        Weights: tensors under the parameter names of the authors' model.
    """
    layout = _LAYOUTS[family]
    names = {ours: theirs for theirs, ours in layout.names.items()}
    blocks = {
        name.replace("blocks.", "layers.", 1): value
        for name, value in side.items()
        if name.startswith("blocks.")
    }
    if family == "opt":
        converted = opt_tune_to_hf(blocks)
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


def write_authors_folder(folder: Path, state: Weights) -> None:
    """Write the six files that the authors' code loads, whole or not at all.

    Args:
        folder (Path): replaced if it exists.
        state (Weights): from :func:`side_to_authors`.

    Raises:
        UserError: if the folder cannot be written.
    """
    files: dict[str, bytes] = {}
    for name, prefix in _LAYOUTS[family_of(state)].files.items():
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
    write_folder(folder, files)


def family_of(state: Weights) -> Family:
    """Tell for which of the authors' two models a state is.

    Args:
        state (Weights): from :func:`read_authors_folder`.

    Returns:
        Family: "llama" or "opt".
    """
    return "opt" if any(name.startswith("model.decoder.") for name in state) else "llama"


def _load_tensors(path: Path, files: dict[str, str]) -> Weights | torch.Tensor:
    content: Any
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: a folder of the authors' code holds {', '.join(files)}"
        ) from None
    except Exception as error:  # torch.load raises many types for a damaged or hostile file
        reason = str(error).split(". ")[0].split("\n")[0]
        raise UserError(f"{path} is not a plain state dict and was not loaded: {reason}") from error
    tensors = content.values() if isinstance(content, dict) else [content]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise UserError(f"{path} is not a plain state dict: it holds more than tensors")
    loaded: Weights | torch.Tensor = content
    return loaded
