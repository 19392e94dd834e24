"""PEQA models: the generic builder, and a line for each model size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torchtune.models.llama2 import llama2, llama2_7b, llama2_13b, llama2_70b
from torchtune.models.llama3_1 import llama3_1, llama3_1_8b, llama3_1_70b
from torchtune.models.llama3_2 import llama3_2, llama3_2_1b, llama3_2_3b
from torchtune.modules import TransformerDecoder

from qst_tune.backbone.directory_format import DirectoryFormat
from qst_tune.errors import UserError
from qst_tune.models.builder import method_builder
from qst_tune.models.smollm2 import smollm2_1_7b, smollm2_135m, smollm2_360m
from qst_tune.modules.base_quantization import MakeLinear, replace_linears
from qst_tune.modules.embedding_quantization import EmbeddingQuantization, quantize_embedding
from qst_tune.modules.peqa_decoder import PEQADecoder
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.affine import AffineInit


def peqa_decoder(
    backbone: TransformerDecoder,
    *,
    bits: int = 4,
    group_size: int | None = None,
    init: AffineInit = "rtn",
    train_zero_points: bool = False,
    embedding_quantization: EmbeddingQuantization = "none",
) -> PEQADecoder:
    """Build a PEQA model from a torchtune decoder, which may be on meta or have weights.

    Args:
        backbone (TransformerDecoder): taken over; the linears of its layers become integer ones
            and only their scales train. Everything else is frozen, and norms stay as they are.
        bits (int): of a code: 2 (with a warning), 3, 4 or 8.
        group_size (int | None): input channels that share a scale, any number from 1; None: all,
            the paper's choice. Smaller groups start nearer to the model, and store and train more.
            Of a directory that stores integers, their scales train as they are, in its groups.
        init (AffineInit): "rtn", rounding to nearest over the full range, or "mse", which searches
            a narrower range with less squared error.
        train_zero_points (bool): train them beside the scales, the paper's ablation. Such a model
            cannot be exported for integer kernels.
        embedding_quantization (EmbeddingQuantization): format of the embedding and the LM head,
            which the paper keeps as they are: "none", "int8" (a scale a token) or "nf4".

    Returns:
        PEQADecoder: trains ``O x ceil(I / group_size)`` fp32 numbers a linear of O x I.

    Raises:
        UserError: if the decoder is a model of transformers, or its directory is quantised in
            another way.
        ValueError: if an argument is not supported.
    """
    if not isinstance(backbone, TransformerDecoder):
        kind = backbone.config.model_type
        raise UserError(
            f"model_type={kind!r} runs as transformers' own model, in which PEQA does not train "
            "scales yet: use QST (auto/qst)"
        )
    stored = getattr(backbone, "stored_format", None)
    make: MakeLinear = partial(
        PEQALinear,
        bits=bits,
        group_size=group_size,
        init=init,
        train_zero_points=train_zero_points,
    )
    if stored is not None:
        make = _stored_linear(stored, bits, group_size, train_zero_points)
    replace_linears(backbone.layers, make)
    quantize_embedding(backbone, embedding_quantization)
    return PEQADecoder(backbone)


def _stored_linear(
    stored: DirectoryFormat, bits: int, group_size: int | None, train_zero_points: bool
) -> MakeLinear:
    """Makes linears of a directory's own integers, which the settings must not contradict."""
    if stored.own is None or not stored.own.startswith("int"):
        raise UserError(
            f"the directory is {stored.title}, which has no integer codes with scales for PEQA to "
            "train; name the directory of the model that is not quantised"
        )
    wide = 2**20  # more than any group
    linear: Any = stored.make(torch.empty(1, wide, device="meta"), None)
    own_bits, own_size, _ = linear.layout
    if bits != own_bits:
        raise UserError(f"model.bits={bits}: the directory is {stored.title}; set it to {own_bits}")
    if group_size not in (None, None if own_size == wide else own_size):
        raise UserError(f"model.group_size={group_size}: the directory is {stored.title}")
    if train_zero_points:
        raise UserError(f"model.train_zero_points=True: those of {stored.title} do not train")
    return stored.make


def peqa_builder(
    backbone_builder: Callable[..., TransformerDecoder],
) -> Callable[..., PEQADecoder]:
    """Turn a builder of a torchtune decoder into a builder of a PEQA model over it.

    Args:
        backbone_builder (Callable[..., TransformerDecoder]): a component or model builder.

    Returns:
        Callable[..., PEQADecoder]: takes the arguments of ``backbone_builder`` and those of
        :func:`peqa_decoder`, all flat.
    """
    return method_builder("peqa", peqa_decoder, backbone_builder)


# Component builders: every size given as an argument.
peqa_llama2 = peqa_builder(llama2)
peqa_llama3_1 = peqa_builder(llama3_1)
peqa_llama3_2 = peqa_builder(llama3_2)

# Model builders: the published sizes.
peqa_llama2_7b = peqa_builder(llama2_7b)
peqa_llama2_13b = peqa_builder(llama2_13b)
peqa_llama2_70b = peqa_builder(llama2_70b)
peqa_llama3_1_8b = peqa_builder(llama3_1_8b)
peqa_llama3_1_70b = peqa_builder(llama3_1_70b)
peqa_llama3_2_1b = peqa_builder(llama3_2_1b)
peqa_llama3_2_3b = peqa_builder(llama3_2_3b)
peqa_smollm2_135m = peqa_builder(smollm2_135m)
peqa_smollm2_360m = peqa_builder(smollm2_360m)
peqa_smollm2_1_7b = peqa_builder(smollm2_1_7b)
