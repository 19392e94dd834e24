"""The generic QST builder: a side network for any decoder, torchtune's or transformers'."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torchtune import training, utils
from torchtune.modules import TransformerDecoder

from qst_tune.backbone.repair import reserve_repairs
from qst_tune.backbone.side_blocks import is_opt
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.models.builder import method_builder
from qst_tune.modules.backbone import Backbone
from qst_tune.modules.backbone_formats import BaseQuantization, EmbeddingQuantization
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.config import SIDE_PARAMETERS, SideConfig
from qst_tune.modules.side.network import SideNetwork
from qst_tune.modules.torchtune_backbone import TorchtuneBackbone

log = utils.get_logger("INFO")

Decoder: TypeAlias = TransformerDecoder | TransformersBackbone


def qst_decoder(
    backbone: Decoder,
    *,
    quantize_base: bool = True,
    base_quantization: BaseQuantization | None = None,
    repair_rank: int = 0,
    embedding_quantization: EmbeddingQuantization = "none",
    **side: Any,
) -> QSTModel:
    """Build a QST model from a decoder, which may be on the meta device or have weights.

    Args:
        backbone (Decoder): torchtune's ``TransformerDecoder``, or a model of transformers as
            ``TransformersBackbone``. Taken over and frozen; the linears of its layers are
            quantised, norms stay as they are.
        quantize_base (bool): torchtune's switch; False is short for ``base_quantization="none"``.
        base_quantization (BaseQuantization | None): "nf4", "fp4", "int4" (in groups of 64), "int8"
            (per channel), or "none", which keeps the backbone as it is (ladder side tuning, LST);
            "auto": the own format of a directory that is quantised already (docs/models.md), else
            "nf4"; None: "auto" if ``quantize_base``.
        repair_rank (int): gives back most of what rounding to ``base_quantization`` took: loading
            adds to each linear a frozen product of this rank, computed from its weight and a short
            text (:class:`~qst_tune.backbone.repair.Repairs`); 0: no repair. Only on meta.
        embedding_quantization (EmbeddingQuantization): format of the embedding and the LM head:
            "int8" (a scale a token), or "none", which keeps them as they are. They are 2 GB of an
            8B model with a vocabulary of 128k.
        **side (Any): fields of :class:`~qst_tune.modules.side.config.SideConfig`; the signature
            lists them.

    Returns:
        QSTModel: a ``QSTDecoder`` of a torchtune decoder, else a ``QSTTransformer``: fp32 side
        network, frozen backbone. With the "residual" mix, and the "alpha" mix
        from 1, its logits equal the quantised backbone's bit for bit. Of a backbone on meta the
        side network is on meta too: see ``QSTModel.initialize_side``.

    Raises:
        ValueError: if a name is unknown, r does not fit the backbone, or a weight has no such
            format.
    """
    if base_quantization is None:
        base_quantization = "auto" if quantize_base else "none"
    elif not quantize_base and base_quantization != "none":
        raise ValueError(
            f"quantize_base=False and base_quantization={base_quantization!r} contradict each "
            "other; leave one of them out"
        )
    config = SideConfig(**side)
    if config.ineffective():
        log.warning(
            f"{', '.join(config.ineffective())}: without effect, since lora_layers=0 trains no "
            "LoRA; set lora_layers, the number of last layers in which it trains, or remove it"
        )
    if config.variant == "authors" and is_opt_model(backbone):
        # Their OPT code (modeling_opt_qst.py:1821) weighs the side network with sigmoid(z), their
        # LLaMA code (modeling_llama_qst.py:1470) the backbone.
        config = replace(config, output_mix=config.output_mix or "swapped_sigmoid")
    of_torchtune = isinstance(backbone, TransformerDecoder)
    frozen: Backbone = TorchtuneBackbone(backbone) if of_torchtune else backbone
    device = frozen.embedding.weight.device
    with training.set_default_dtype(torch.float32), device:
        network = SideNetwork(frozen, config.resolved(frozen.width, frozen.num_layers))
    frozen.quantize(base_quantization, embedding_quantization)
    dtype, stored = frozen.embedding.weight.dtype, getattr(backbone, "stored", None)
    reserve_repairs(backbone.layers, repair_rank, dtype, stored)
    model = (QSTDecoder if of_torchtune else QSTTransformer)(backbone, network)
    if device.type != "meta":
        model.initialize_side(device)
    return model


def is_opt_model(backbone: Any) -> bool:
    """Whether a backbone is an OPT, which the authors' code treats otherwise than LLaMA."""
    return isinstance(backbone, TransformersBackbone) and is_opt(backbone.config)


_OWN = [p for p in inspect.signature(qst_decoder).parameters.values() if p.name != "side"]
qst_decoder.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # read by inspect
    [*_OWN, *SIDE_PARAMETERS], return_annotation=QSTModel
)


def qst_builder(backbone_builder: Callable[..., Decoder]) -> Callable[..., QSTModel]:
    """Turn a builder of a decoder into one of a QST model, with the arguments of both."""
    return method_builder("qst", qst_decoder, backbone_builder)
