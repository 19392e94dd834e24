"""Build and load decoders by transformers' own means."""

import json
from pathlib import Path
from typing import Any

import torch
from torchtune import utils

from qst_tune.backbone.hf_quantizer import drop_other_modalities, quantization_config_type
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError

log = utils.get_logger("INFO")


def backbone_on_meta(folder: Path, max_seq_len: int | None = None) -> TransformersBackbone:
    """Build the decoder that a directory's ``config.json`` describes, without memory.

    Args:
        folder (Path): in Hugging Face's format; only ``config.json`` is read.
        max_seq_len (int | None): the longest sequence; None: the model's number of positions.

    Returns:
        TransformersBackbone: on the meta device, not quantised.

    Raises:
        UserError: if transformers has no such model, it is no decoder, or it is quantised already.
    """
    config = _read_config(folder)
    with torch.device("meta"):
        try:
            model = _model_type(config, folder).from_config(config)
        except UserError:
            raise
        except Exception as error:  # transformers' models raise what they like
            raise _refused(folder, config, error) from error
    drop_other_modalities(model)
    return TransformersBackbone(model, str(folder), max_seq_len)


def load_backbone(
    backbone: TransformersBackbone, folder: Path, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a backbone from a directory with transformers' own loader, weight by weight.

    Each weight is read, renamed and fused as transformers does it for the model type, then
    quantised and dropped, before the next: the unquantised model never lies in memory whole.

    Args:
        backbone (TransformersBackbone): built by :func:`backbone_on_meta`, perhaps quantised there;
            changed in place.
        folder (Path): of the model that it was built for.
        dtype (torch.dtype): of what is not quantised.
        device (torch.device): where the backbone shall be.

    Raises:
        UserError: if the directory describes another model, a weight is missing or has another
            shape, or the LM head does something that is not known here.
    """
    _check_same(backbone, folder)
    config = _read_config(folder)
    make_config = quantization_config_type()
    try:
        model, info = _model_type(config, folder).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=make_config(backbone.base_quantization, device),
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        raise _refused(folder, config, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's weights, for example {missing[0]}"
        )
    move_dense_(model, device)
    backbone.take(model)
    backbone.quantize_embedding()
    check_head(backbone)


def move_dense_(model: Any, device: torch.device) -> None:
    """Move, in place, what is not quantised; quantised weights were made where they belong.

    Args:
        model (Any): loaded.
        device (torch.device): where to.
    """
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.device != device:
                tensor.data = tensor.data.to(device)
                del name


@torch.no_grad()
def check_head(backbone: TransformersBackbone) -> None:
    """Compare head(f) with the model's own logits on four tokens.

    Args:
        backbone (TransformersBackbone): loaded.

    Raises:
        UserError: if they differ: the model does something between its decoder and its logits.
    """
    weight: Any = backbone.embedding.weight
    tokens = torch.arange(4, device=weight.device)[None] % len(weight)
    want = backbone.model(input_ids=tokens, use_cache=False).logits.float()
    f_BTD = backbone.run(tokens, taps=(), visit=lambda h: None)
    difference = (backbone.head(f_BTD).float() - want).abs().max()
    if not difference <= 0.02 * want.abs().max():
        raise UserError(
            f"model_type={backbone.config.model_type!r}: its logits are more than its LM head and "
            f"a known scale or cap (they differ by {difference:.3g}); it is not supported"
        )


def _read_config(folder: Path) -> Any:
    """transformers' configuration; code of the directory is never run."""
    from transformers import AutoConfig

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings.get("quantization_config"):
        raise UserError(
            f"{folder / 'config.json'}: quantization_config: the model is quantised already; name "
            "the directory of the one that is not"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / 'config.json'}: transformers cannot read it: {reason}") from (
            error
        )


def _model_type(config: Any, folder: Path) -> Any:
    """The class of transformers that writes text with such a configuration."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder / 'config.json'}: model_type={config.model_type!r} is an encoder with a "
            "decoder; only decoders are supported"
        )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise UserError(
        f"{folder / 'config.json'}: model_type={config.model_type!r} writes no text in "
        f"transformers {transformers.__version__}; it is not supported"
    )


def _check_same(backbone: TransformersBackbone, folder: Path) -> None:
    if not backbone.folder or Path(backbone.folder).resolve() == folder.resolve():
        return
    built, found = (json.loads((Path(f) / "config.json").read_text()) for f in (backbone.folder, folder))
    if built != found:
        raise UserError(
            f"the config's model block names {backbone.folder}, which describes another model than "
            f"{folder}"
        )


def _refused(folder: Path, config: Any, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return UserError(
        f"{folder}: transformers cannot load this model (model_type={config.model_type!r}): {reason}"
    )
