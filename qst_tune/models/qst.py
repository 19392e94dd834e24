"""The generic QST builder: a side network for any decoder, torchtune's or transformers'."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torchtune import training
from torchtune.modules import TransformerDecoder

from qst_tune.backbone.qst_transformer import QSTTransformer
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.models.builder import method_builder
from qst_tune.modules.backbone import Backbone
from qst_tune.modules.base_quantization import BaseQuantization
from qst_tune.modules.downsample import Activation, DownsampleKind, build_downsample
from qst_tune.modules.embedding_quantization import EmbeddingQuantization
from qst_tune.modules.learned_positions import LearnedPositionDecoder
from qst_tune.modules.output_mix import OutputMixKind, build_output_mix
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side_block import MIN_HEAD_DIM
from qst_tune.modules.side_network import (
    Gate,
    SideNetwork,
    ZeroLinear,
    evenly_spaced_layers,
)
from qst_tune.modules.torchtune_backbone import TorchtuneBackbone

Decoder: TypeAlias = TransformerDecoder | TransformersBackbone

Variant = Literal["default", "paper", "authors"]

# What each variant fixes; every one of these is an argument of qst_decoder and can be overridden.
VARIANTS: dict[str, dict[str, Any]] = {
    # What measured best (docs/results.md). Starts at the backbone like the paper's, and learns from
    # the first step.
    "default": {
        "num_side_blocks": 6,
        "normalize_hidden": True,
        "downsample": "adapter",
        "rank": 16,
        "output_mix": "residual",
        "mix_per_channel": False,
        "gate_per_channel": False,
        "initial_gamma": 0.0,
        "share_first_downsample": False,
        "downsample_norm": True,
        "min_head_dim": 32,
    },
    # The equations of arXiv 2401.07159.
    "paper": {
        "num_side_blocks": None,  # one for every layer
        "normalize_hidden": False,
        "downsample": "adapter",
        "rank": 16,
        "output_mix": "alpha",
        "mix_per_channel": False,
        "gate_per_channel": False,
        "initial_gamma": 0.0,
        "share_first_downsample": False,
        "downsample_norm": False,
        "min_head_dim": MIN_HEAD_DIM,
    },
    # The authors' code (github.com/YouAreSpecialToMe/QST at 27cef0a), tensor by tensor.
    "authors": {
        "num_side_blocks": None,  # one for every layer
        "normalize_hidden": False,
        "downsample": "adapter",
        "rank": 16,
        "output_mix": "sigmoid",
        "mix_per_channel": True,
        "gate_per_channel": True,
        "initial_gamma": 0.5,
        "share_first_downsample": True,
        "downsample_norm": True,
        "min_head_dim": MIN_HEAD_DIM,
    },
}


def qst_decoder(
    backbone: Decoder,
    *,
    reduction_factor: int = 16,
    variant: Variant = "default",
    quantize_base: bool = True,
    base_quantization: BaseQuantization | None = None,
    embedding_quantization: EmbeddingQuantization = "none",
    hidden_bits: int = 16,
    num_side_blocks: int | None = None,
    normalize_hidden: bool | None = None,
    downsample: DownsampleKind | None = None,
    rank: int | None = None,
    output_mix: OutputMixKind | None = None,
    mix_per_channel: bool | None = None,
    gate_per_channel: bool | None = None,
    initial_gamma: float | None = None,
    share_first_downsample: bool | None = None,
    downsample_norm: bool | None = None,
    min_head_dim: int | None = None,
    initial_mix: float = 1.0,
    activation: Activation = "silu",
    dropout: float = 0.0,
) -> QSTModel:
    """Build a QST model from a decoder, which may be on the meta device or have weights.

    Args:
        backbone (Decoder): torchtune's ``TransformerDecoder``, or a model of transformers as
            ``TransformersBackbone``. Taken over and frozen; the linears of its layers are
            quantised, norms stay as they are.
        reduction_factor (int): r; the side network has width ``embed_dim // r``. Higher trains
            fewer parameters in less memory.
        variant (Variant): preset of the arguments below: "default", "paper" or "authors".
        quantize_base (bool): torchtune's switch; False is short for ``base_quantization="none"``.
        base_quantization (BaseQuantization | None): "nf4", "fp4", "int4" (in groups of 64), "int8"
            (per channel), or "none", which keeps the backbone as it is (ladder side tuning, LST);
            "auto": the own format of a directory that is quantised already (docs/models.md), else
            "nf4"; None: "auto" if ``quantize_base``.
        embedding_quantization (EmbeddingQuantization): format of the embedding and the LM head:
            "int8" (a scale a token), "nf4", or "none", which keeps them as they are. They are 2 GB
            of an 8B model with a vocabulary of 128k.
        hidden_bits (int): 16, 8 or 4; bits in which "linear", "lora" and "adapter" keep the hidden
            states for backward (with recomputation on, else the decoded ones are kept too).
        num_side_blocks (int | None): side blocks, evenly spaced beside the backbone's layers; None:
            the variant's, at most one for every layer.
        normalize_hidden (bool | None): read each token's hidden state divided by its root mean
            square; None: the variant's.
        downsample (DownsampleKind | None): "linear", "lora", "adapter", "maxpool" or "avgpool";
            None: the variant's.
        rank (int | None): bottleneck of the "lora" and "adapter" downsamplers; None: the variant's,
            at most the backbone's width.
        output_mix (OutputMixKind | None): "residual", "alpha", "sigmoid" or "swapped_sigmoid";
            None: the variant's, where "authors" means swapped over OPT.
        mix_per_channel (bool | None): one alpha, or one z, per channel instead of one for all;
            None: the variant's.
        gate_per_channel (bool | None): one gamma per channel instead of one per layer; None: the
            variant's.
        initial_gamma (float | None): start of every gate's gamma; None: the variant's.
        share_first_downsample (bool | None): read the embedding with layer 1's downsampler, as the
            authors' code does; None: the variant's.
        downsample_norm (bool | None): LayerNorm behind an "adapter"; None: the variant's.
        min_head_dim (int | None): fewer heads than the backbone's where theirs would be narrower;
            None: the variant's.
        initial_mix (float): start of alpha in the "alpha" mix, of z in "sigmoid" and
            "swapped_sigmoid"; "residual" has nothing to start.
        activation (Activation): of an "adapter": "silu", "relu", "gelu" or "identity".
        dropout (float): share of a hidden state's channels that are not read, in training.

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
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    chosen = {
        "num_side_blocks": num_side_blocks,
        "normalize_hidden": normalize_hidden,
        "downsample": downsample,
        "rank": rank,
        "output_mix": output_mix,
        "mix_per_channel": mix_per_channel,
        "gate_per_channel": gate_per_channel,
        "initial_gamma": initial_gamma,
        "share_first_downsample": share_first_downsample,
        "downsample_norm": downsample_norm,
        "min_head_dim": min_head_dim,
    }
    settings = _variant_settings(variant, backbone)
    settings.update((name, value) for name, value in chosen.items() if value is not None)
    frozen = _as_backbone(backbone)
    device = frozen.embedding.weight.device
    with training.set_default_dtype(torch.float32), device:
        side = _side_network(
            frozen,
            reduction_factor=reduction_factor,
            hidden_bits=hidden_bits,
            initial_mix=initial_mix,
            activation=activation,
            dropout=dropout,
            **settings,
        )
    frozen.quantize(base_quantization, embedding_quantization)
    model = _assemble(backbone, side)
    if device.type != "meta":
        model.initialize_side(device)
    return model


def _variant_settings(variant: Variant, backbone: Decoder) -> dict[str, Any]:
    frozen = _as_backbone(backbone)
    settings, num_layers = dict(VARIANTS[variant]), frozen.num_layers
    # The variant's, which a tiny backbone may be too narrow or too shallow for.
    settings["rank"] = min(settings["rank"], frozen.width)
    settings["num_side_blocks"] = min(settings["num_side_blocks"] or num_layers, num_layers)
    if variant == "authors" and isinstance(backbone, LearnedPositionDecoder):
        # Their OPT code (modeling_opt_qst.py:1821) weighs the side network with sigmoid(z), their
        # LLaMA code (modeling_llama_qst.py:1470) the backbone.
        settings["output_mix"] = "swapped_sigmoid"
    return settings


def _side_network(
    backbone: Backbone,
    *,
    reduction_factor: int,
    num_side_blocks: int,
    normalize_hidden: bool,
    downsample: DownsampleKind,
    rank: int,
    hidden_bits: int,
    output_mix: OutputMixKind,
    mix_per_channel: bool,
    gate_per_channel: bool,
    initial_gamma: float,
    share_first_downsample: bool,
    downsample_norm: bool,
    min_head_dim: int,
    initial_mix: float,
    activation: Activation,
    dropout: float,
) -> SideNetwork:
    embed_dim = backbone.width
    shape = backbone.side_shape(reduction_factor, min_head_dim)
    layers = evenly_spaced_layers(num_side_blocks, backbone.num_layers)
    num_downsamplers = num_side_blocks if share_first_downsample else num_side_blocks + 1
    upsample_type = ZeroLinear if output_mix == "residual" else nn.Linear
    return SideNetwork(
        downsample=nn.ModuleList(
            build_downsample(
                downsample,
                embed_dim,
                shape.embed_dim,
                rank=rank,
                activation=activation,
                norm=downsample_norm,
                hidden_bits=hidden_bits,
                dropout=dropout,
            )
            for _ in range(num_downsamplers)
        ),
        gates=nn.ModuleList(
            Gate(shape.embed_dim if gate_per_channel else 1, initial_gamma)
            for _ in range(num_side_blocks)
        ),
        blocks=backbone.side_blocks(layers, shape),
        norm=backbone.side_norm(shape.embed_dim),
        upsample=upsample_type(shape.embed_dim, embed_dim),
        output_mix=build_output_mix(output_mix, embed_dim if mix_per_channel else 1, initial_mix),
        layers=layers,
        normalize_hidden=normalize_hidden,
    )


def _as_backbone(decoder: Decoder) -> Backbone:
    """The decoder behind the interface that a side network is built from."""
    return TorchtuneBackbone(decoder) if isinstance(decoder, TransformerDecoder) else decoder


def _assemble(backbone: Decoder, side: SideNetwork) -> QSTModel:
    if isinstance(backbone, TransformerDecoder):
        return QSTDecoder(backbone, side)
    return QSTTransformer(backbone, side)


def qst_builder(backbone_builder: Callable[..., Decoder]) -> Callable[..., QSTModel]:
    """Turn a builder of a decoder into a builder of a QST model over it.

    Args:
        backbone_builder (Callable[..., Decoder]): a component or model builder.

    Returns:
        Callable[..., QSTModel]: takes the arguments of ``backbone_builder`` and those of
        :func:`qst_decoder`, all flat.
    """
    return method_builder("qst", qst_decoder, backbone_builder)
