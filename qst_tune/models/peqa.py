"""The generic PEQA builder: integer weights for any decoder, torchtune's or transformers'."""

from collections.abc import Callable
from typing import Any

import torch

from qst_tune.backbone.stored_weights import DirectoryFormat
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.backbone.transformers_models import PEQATransformer
from qst_tune.errors import UserError
from qst_tune.models.builder import method_builder
from qst_tune.models.qst import Decoder
from qst_tune.modules.backbone_formats import (
    EmbeddingQuantization,
    Integers,
    quantize_embedding,
    quantize_linears,
)
from qst_tune.modules.peqa_model import PEQADecoder, PEQAModel, named_integers
from qst_tune.quantization.affine import AffineInit


def peqa_decoder(
    backbone: Decoder,
    *,
    bits: int = 4,
    group_size: int | None = None,
    init: AffineInit = "rtn",
    train_zero_points: bool = False,
    embedding_quantization: EmbeddingQuantization = "none",
) -> PEQAModel:
    """Build a PEQA model from a decoder, which may be on meta or have weights.

    Args:
        backbone (Decoder): torchtune's ``TransformerDecoder``, or a model of transformers as
            ``TransformersBackbone``. Taken over; the linears of its layers and the experts of
            mixtures become integer ones and only their scales train. Everything else is frozen.
        bits (int): of a code: 2 (with a warning), 3, 4 or 8.
        group_size (int | None): input channels that share a scale, any number from 1; None: all,
            the paper's choice. Smaller groups start nearer to the model, and store and train more.
            Of a directory that stores integers, their scales train as they are, in its groups.
        init (AffineInit): "rtn", rounding to nearest over the full range, or "mse", which searches
            a narrower range with less squared error.
        train_zero_points (bool): train them in addition to the scales, the paper's ablation. Such
            a model cannot be exported for integer kernels.
        embedding_quantization (EmbeddingQuantization): format of the embedding and the LM head,
            which the paper keeps as they are: "none" or "int8" (a scale a token).

    Returns:
        PEQAModel: trains ``O x ceil(I / group_size)`` fp32 numbers a linear of O x I.

    Raises:
        UserError: if the decoder has no linear layers, or its directory is quantised in another
            way.
        ValueError: if an argument is not supported.
    """
    form = Integers(bits, group_size, init, train_zero_points)
    if not isinstance(backbone, TransformersBackbone):
        quantize_linears(backbone.layers, form)
        quantize_embedding(backbone, embedding_quantization)
        return PEQADecoder(backbone)
    if backbone.stored is not None:
        _check_stored(backbone.stored, form)
    backbone.quantize(form if backbone.stored is None else "auto", embedding_quantization)
    if not named_integers(backbone.layers):
        raise UserError(
            f"model_type={backbone.config.model_type!r} has no linear layers of torch's own type, "
            "whose scales PEQA could train"
        )
    return PEQATransformer(backbone)


def _check_stored(stored: DirectoryFormat, form: Integers) -> None:
    """Check that the settings do not contradict a directory's own integers, which train."""
    if stored.own is None or not stored.own.startswith("int"):
        raise UserError(
            f"the directory is {stored.title}, which has no integer codes with scales for PEQA to "
            "train; name the directory of the model that is not quantised"
        )
    wide = 2**20  # more than any group
    linear: Any = stored.make(torch.empty(1, wide, device="meta"), None)
    bits, group_size, _ = linear.layout
    if form.bits != bits:
        raise UserError(
            f"model.bits={form.bits}: the directory is {stored.title}; set it to {bits}"
        )
    if form.group_size not in (None, None if group_size == wide else group_size):
        raise UserError(f"model.group_size={form.group_size}: the directory is {stored.title}")
    if form.train_zero_points:
        raise UserError(f"model.train_zero_points=True: those of {stored.title} do not train")


def peqa_builder(backbone_builder: Callable[..., Decoder]) -> Callable[..., PEQAModel]:
    """Turn a builder of a decoder into one of a PEQA model, with the arguments of both."""
    return method_builder("peqa", peqa_decoder, backbone_builder)
