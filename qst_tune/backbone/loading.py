"""Build and load decoders by transformers' own means."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torchtune import utils

from qst_tune.backbone.directory import weight_files
from qst_tune.backbone.directory_methods import read_directory_format
from qst_tune.backbone.experts import ExpertLinears
from qst_tune.backbone.identity import Fingerprint, WeightDigests
from qst_tune.backbone.placing import (
    Placing,
    Take,
    decode_rest_,
    drop_other_modalities,
    quantization_config_type,
)
from qst_tune.backbone.quantizers import (
    forget_weights,
    quantization_of_text,
    quantize_tables,
    quantized_share,
)
from qst_tune.backbone.repair import RepairPlacing, Repairs, repair_rank_of
from qst_tune.backbone.stored_weights import (
    DirectoryFormat,
    as_dense,
    check_dtypes,
    check_unused,
    open_tensors,
)
from qst_tune.backbone.text_model import longest_text
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.json_files import read_json
from qst_tune.modules.backbone_formats import QuantizedLinear

_LITTLE = 0.5

log = utils.get_logger("INFO")


def backbone_on_meta(directory: Path, max_seq_len: int | None = None) -> TransformersBackbone:
    """Build the decoder that a directory's ``config.json`` describes on meta, not quantised.

    UserError if transformers has no such decoder, it has fewer than ``max_seq_len`` positions, or
    its weights are stored in a format that cannot be read.
    """
    config = _read_config(directory)
    _check_version(config)
    with torch.device("meta"):
        try:
            dtype = torch.get_default_dtype()  # not that of the file: the recipe's
            model = _model_type(config, directory).from_config(config, dtype=dtype)
        except UserError:
            raise
        except Exception as error:  # transformers' models raise what they like
            raise _refused(directory, config, error) from error
    drop_other_modalities(model)
    stored = directory_format(directory)
    backbone = TransformersBackbone(model, str(directory), max_seq_len, stored=stored)
    longest = longest_text(backbone.config)
    if max_seq_len is not None and max_seq_len > longest:
        raise UserError(
            f"max_seq_len={max_seq_len} is more than the {longest} positions of {directory}: lower "
            "it"
        )
    return backbone


def load_transformers_backbone(
    backbone: TransformersBackbone,
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    take: Take | None = None,
) -> Fingerprint:
    """Fill a backbone from a directory with transformers' own loader, weight by weight.

    Each weight is read, renamed and fused as transformers does it for the model type, then
    quantised and dropped before the next: the whole unquantised model is never in memory. For a
    repair all are read twice. The backbone was built by :func:`backbone_on_meta`, and perhaps
    quantised there. ``take`` gets the weights of each module instead of it; the backbone then gets
    the rest, and is not repaired. Returns the fingerprint of the files' weights. UserError if the
    directory describes another model, a weight is missing, has another shape or is not finite, or
    the LM head does something that is not known here.
    """
    check_same(backbone, directory)
    repair_rank = repair_rank_of(backbone)
    place = Placing(backbone.base_quantization, device, backbone.stored, take)
    model, info, fingerprint = _from_pretrained(directory, place, dtype)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{directory} lacks {len(missing)} of the model's weights, for example {missing[0]}"
        )
    if place.stored is not None:
        decode_rest_(model, device)
        place.report()
    move_dense_(model, device)
    quantize_tables(model.get_input_embeddings(), model, backbone.embedding_quantization)
    if take is None:
        transplant_(backbone.model, model)
        check_head(backbone)
    else:
        for path, module in model.named_modules():
            take(path, module)
        transplant_rest_(backbone.model, model)
    if backbone.base_quantization != "none":
        _report_share(backbone)
    if repair_rank and take is None:
        repairs = Repairs(backbone.model, backbone, directory, repair_rank)
        repair(repairs, backbone, directory, dtype, fingerprint)
    return fingerprint


def repair(
    repairs: Repairs,
    backbone: TransformersBackbone,
    directory: Path,
    dtype: torch.dtype,
    fingerprint: Fingerprint,
) -> None:
    """Read all weights a second time, for what rounding took from them."""
    again = RepairPlacing(repairs, backbone.base_quantization)
    repairs.finish(fingerprint, _from_pretrained(directory, again, dtype)[2])


def _from_pretrained(
    directory: Path, place: Placing | RepairPlacing, dtype: torch.dtype
) -> tuple[Any, dict[str, Any], Fingerprint]:
    """The model, transformers' report, and the fingerprint of what it has read and left."""
    from transformers.models.auto.auto_factory import _get_model_class

    config = _read_config(directory)
    # An auto class would want the name of a directory, and read what its index names.
    model_type = _get_model_class(config, _model_type(config, directory)._model_mapping)
    digests = WeightDigests()
    tensors = open_tensors(weight_files(directory), digests)
    weights: dict[str, Any] = dict(tensors)
    if place.stored is None:
        check_dtypes(tensors)
    else:
        weights = as_dense(tensors, place.stored, dtype)
    with _quietly(errors_only=place.stored is not None):
        try:
            model, info = model_type.from_pretrained(
                None,
                state_dict=weights,
                config=config,
                dtype=dtype,
                quantization_config=quantization_config_type()(place),
                output_loading_info=True,
            )
        except UserError:
            raise
        except Exception as error:
            raise place.error or _refused(directory, config, error) from error
    forget_weights(model)
    if place.stored is not None:
        check_unused(info["unexpected_keys"], weights, directory)
    for tensor in tensors.values():
        tensor.identify()  # those that were not read
    return model, info, digests.fingerprint()


@contextmanager
def _quietly(*, errors_only: bool) -> Iterator[None]:
    """Keep transformers' bar out of the log; ``errors_only``: its table of unknown tensors too."""
    from transformers.utils import logging

    was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if errors_only:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()


def _report_share(backbone: TransformersBackbone) -> None:
    share = quantized_share(backbone.layers)
    stored = quantization_of_text(backbone.layers, backbone.embedding)
    text = f"{100 * share:.0f} % of the layers' weights are stored as {stored}"
    if share < _LITTLE:
        log.warning(f"{text}: model_type={backbone.config.model_type} keeps them in other layers")
    else:
        log.info(text)


def transplant_(model: Any, loaded: Any) -> None:
    """Give a model on meta, in place, the weights of an equal one, which is not usable afterwards.

    Its modules stay the same: the loss, for one, has taken its LM head.
    """
    for name, source in list(loaded.named_modules()):
        target = model.get_submodule(name)
        if any(isinstance(m, QuantizedLinear | ExpertLinears) for m in (source, target)):
            # Its layout is that of the directory, which config.json may not give for each weight.
            model.set_submodule(name, source)
            continue
        for experts in source._parameters.keys() & target._modules.keys():
            del target._modules[experts]  # that the directory has dense
        target._parameters.update(source._parameters)
    transplant_rest_(model, loaded)
    model.requires_grad_(False)


def transplant_rest_(model: Any, loaded: Any) -> None:
    """Give a model, in place, what another one has except parameters, such as rotary tables."""
    model._weight_conversions = getattr(loaded, "_weight_conversions", None)  # export reverts them
    for name, source in loaded.named_modules():
        if not isinstance(source, QuantizedLinear):
            target = model.get_submodule(name)
            target._buffers.update(source._buffers)
            for key, value in vars(source).items():
                if isinstance(value, torch.Tensor):
                    setattr(target, key, value)


def move_dense_(model: Any, device: torch.device) -> None:
    """Move, in place, what is not quantised; quantised weights were made where they belong."""
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.numel() and tensor.device.type != device.type:
                tensor.data = tensor.data.to(device)


@torch.no_grad()
def check_head(backbone: TransformersBackbone) -> None:
    """Compare head(f) with the model's own logits on four tokens.

    UserError if they differ: the model does something between its decoder and its logits.
    """
    weight: Any = backbone.embedding.weight
    tokens = torch.arange(4, device=weight.device)[None] % len(weight)
    want = backbone.model(input_ids=tokens, use_cache=False).logits.float()
    difference = (backbone(tokens).float() - want).abs().max()
    if not difference <= 0.02 * want.abs().max():
        raise UserError(
            f"model_type={backbone.config.model_type!r}: its logits are more than its LM head and "
            f"a known scale or cap (they differ by {difference:.3g}); it is not supported"
        )


def _read_config(directory: Path) -> Any:
    """Transformers' configuration; code of the directory is never run."""
    from transformers import AutoConfig

    read_json(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory / 'config.json'}: transformers cannot read it: {reason}"
        ) from error
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # else transformers would load it by another package
    return config


def directory_format(directory: Path) -> DirectoryFormat | None:
    """Read how a directory stores its weights; None: as they are.

    UserError if weights stored in this way cannot be read.
    """
    settings = read_json(directory / "config.json")
    text = settings.get("text_config") or {}
    found = settings.get("quantization_config") or text.get("quantization_config")
    return read_directory_format(directory / "config.json", found) if found else None


def _check_version(config: Any) -> None:
    """Our quantizer is one of transformers 5."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(
            f"model_type={config.model_type!r} runs as transformers' own model, which needs "
            f"transformers 5 (found {transformers.__version__}): pip install 'transformers>=5'"
        )


def _model_type(config: Any, directory: Path) -> Any:
    """The class of transformers that writes text with such a configuration."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{directory / 'config.json'}: model_type={config.model_type!r} is an encoder with a "
            "decoder; only decoders are supported"
        )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise UserError(
        f"{directory / 'config.json'}: model_type={config.model_type!r} writes no text in "
        f"transformers {transformers.__version__}; it is not supported"
    )


def check_same(backbone: TransformersBackbone, directory: Path) -> None:
    """Refuse a directory whose ``config.json`` is not the one that the backbone is built from."""
    own = backbone.directory
    if own and read_json(Path(own) / "config.json") != read_json(directory / "config.json"):
        raise UserError(
            f"the config's model block names {own}, which describes another model than {directory}"
        )


def _refused(directory: Path, config: Any, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return UserError(
        f"{directory}: transformers cannot load this model (model_type={config.model_type!r}): "
        f"{reason}"
    )
