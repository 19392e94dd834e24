"""Read side networks written by the authors' code (github.com/YouAreSpecialToMe/QST at 27cef0a).

Their ``save_qst_state`` leaves a folder of pickled state dicts with Hugging Face names and without
any configuration. They are read with ``weights_only``: a pickle that wants to run code is refused.
"""

from pathlib import Path

import torch
from torchtune.models import convert_weights

from qst_tune.errors import UserError

# File of the folder -> prefix of its keys in the authors' model.
_FILES = {
    "qst_layers_parameters.pt": "model.qst_layers.",
    "qst_z_parameters.pt": "model.z.",
    "qst_downsample_parameters.pt": "model.downsample.",
    "qst_norm_parameters.pt": "model.norm_qst.",
    "qst_upsample_parameters.pt": "upsample.",
    "lm_head_z_path.pt": "lm_head_z",
}

# Authors' name -> ours, for everything but the side blocks.
_RENAMED = {
    "model.downsample.": "downsample.",
    ".adapter_A.": ".reduce.",
    ".adapter_B.": ".expand.",
    ".post_layer_norm.": ".norm.",
    "model.norm_qst.weight": "norm.scale",
    "lm_head_z": "output_mix.logit",
}


def read_authors_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Read a folder of the authors' LLaMA code.

    Args:
        folder (Path): holds the six files of ``save_qst_state``.

    Returns:
        dict[str, torch.Tensor]: tensors under the parameter names of the authors' model.

    Raises:
        UserError: if a file is missing or is not a plain state dict.
    """
    state: dict[str, torch.Tensor] = {}
    for name, prefix in _FILES.items():
        content = _load_tensors(folder / name)
        if isinstance(content, torch.Tensor):
            state[prefix] = content.detach()
        else:
            state.update({prefix + key: value.detach() for key, value in content.items()})
    return state


def side_from_authors(
    state: dict[str, torch.Tensor], *, num_heads: int, num_kv_heads: int
) -> dict[str, torch.Tensor]:
    """Rename the authors' parameters to those of ``qst_decoder(..., variant="authors").side``.

    Rows of the query and key projections are permuted from transformers' half-split rotary
    embeddings to torchtune's interleaved ones.

    Args:
        state (dict[str, torch.Tensor]): from :func:`read_authors_folder`.
        num_heads (int): query heads of the side blocks (the backbone's own number).
        num_kv_heads (int): key and value heads of the side blocks.

    Returns:
        dict[str, torch.Tensor]: a state dict for the side network.
    """
    blocks = {
        key.replace("model.qst_layers.", "model.layers."): value
        for key, value in state.items()
        if key.startswith("model.qst_layers.")
    }
    embed_dim = state["model.norm_qst.weight"].numel()
    converted = convert_weights.hf_to_tune(
        blocks, num_heads=num_heads, num_kv_heads=num_kv_heads, dim=embed_dim
    )
    side = {key.replace("layers.", "blocks.", 1): value for key, value in converted.items()}
    for key, value in state.items():
        if key.startswith("model.z."):
            side[f"gates.{key.removeprefix('model.z.')}.gamma"] = value
        elif not key.startswith("model.qst_layers."):
            side[_rename(key)] = value
    return side


def _rename(key: str) -> str:
    for theirs, ours in _RENAMED.items():
        key = key.replace(theirs, ours)
    return key


def _load_tensors(path: Path) -> dict[str, torch.Tensor] | torch.Tensor:
    try:
        content: dict[str, torch.Tensor] | torch.Tensor = torch.load(
            path, map_location="cpu", weights_only=True
        )
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: a folder of the authors' code holds {', '.join(_FILES)}"
        ) from None
    except Exception as error:  # torch.load raises many types for a damaged or hostile file
        raise UserError(f"{path} is not a plain state dict and was not loaded: {error}") from error
    return content
