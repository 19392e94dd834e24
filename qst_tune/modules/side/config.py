"""Everything that shapes a side network, in one place."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from qst_tune.modules.lora_targets import ALL_ATTENTION, AttentionLinear
from qst_tune.modules.side.block import MIN_HEAD_DIM
from qst_tune.modules.side.downsample import Activation, DownsampleKind
from qst_tune.modules.side.output_mix import OutputMixKind

Variant = Literal["default", "paper", "authors"]

_PAPER: dict[str, Any] = {
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
}
# What each variant fixes; every one of these is a field of SideConfig and can be overridden.
VARIANTS: dict[str, dict[str, Any]] = {
    # What measured best (docs/results.md). Starts at the backbone like the paper's, and learns from
    # the first step.
    "default": {
        **_PAPER,
        "num_side_blocks": 6,
        "normalize_hidden": True,
        "output_mix": "residual",
        "downsample_norm": True,
        "min_head_dim": 32,
    },
    # The equations of arXiv 2401.07159.
    "paper": _PAPER,
    # The authors' code (github.com/YouAreSpecialToMe/QST at 27cef0a), tensor by tensor.
    "authors": {
        **_PAPER,
        "output_mix": "sigmoid",
        "mix_per_channel": True,
        "gate_per_channel": True,
        "initial_gamma": 0.5,
        "share_first_downsample": True,
        "downsample_norm": True,
    },
}


@dataclass(frozen=True)
class SideConfig:
    """What shapes a side network; None takes the variant's value. ValueError for an unknown one.

    Args:
        reduction_factor (int): r; the side network has width ``D // r``. Higher trains fewer
            parameters in less memory.
        variant (Variant): preset of the fields that are None.
        hidden_bits (int): 16 or 8; bits in which "linear", "lora" and "adapter" save hidden states
            for backward (with recomputation on, else the decoded ones are saved too).
        num_side_blocks (int | None): evenly spaced over the backbone's layers; a variant's is at
            most one for every layer. 0: no side network, LoRA alone.
        normalize_hidden (bool | None): read each token's hidden state over its root mean square.
        downsample (DownsampleKind | None): see :mod:`~qst_tune.modules.side.downsample`.
        rank (int | None): bottleneck of "lora" and "adapter"; a variant's is at most D.
        output_mix (OutputMixKind | None): see :mod:`~qst_tune.modules.side.output_mix`; "authors"
            means swapped over OPT.
        mix_per_channel (bool | None): one alpha, or one z, per channel instead of one for all.
        gate_per_channel (bool | None): one gamma per channel instead of one per layer.
        initial_gamma (float | None): start of every gate's gamma.
        share_first_downsample (bool | None): read the embedding with layer 1's downsampler, as the
            authors' code does.
        downsample_norm (bool | None): LayerNorm behind an "adapter".
        min_head_dim (int | None): fewer heads than the backbone's where theirs would be narrower.
        initial_mix (float): start of alpha in the "alpha" mix, of z in both "sigmoid" ones.
        activation (Activation): of an "adapter".
        dropout (float): share of a hidden state's channels that are not read, in training.
        lora_layers (int): k, the last layers of the backbone in which LoRA trains too; see
            :mod:`~qst_tune.modules.lora`. 0 is QST; all of them, with ``num_side_blocks=0``, QLoRA.
        lora_rank (int): of each product.
        lora_alpha (float): a product is scaled by it over the rank, as in torchtune.
        lora_attn_modules (tuple[AttentionLinear, ...]): linears of attention that get LoRA.
        apply_lora_to_mlp (bool): whether those outside of attention get LoRA.
        lora_dropout (float): share of a linear's inputs that LoRA does not read, in training.
        lora_rank_stabilized (bool): scale by ``lora_alpha`` over the square root of the rank.
    """

    reduction_factor: int = 16
    variant: Variant = "default"
    hidden_bits: int = 16
    num_side_blocks: int | None = None
    normalize_hidden: bool | None = None
    downsample: DownsampleKind | None = None
    rank: int | None = None
    output_mix: OutputMixKind | None = None
    mix_per_channel: bool | None = None
    gate_per_channel: bool | None = None
    initial_gamma: float | None = None
    share_first_downsample: bool | None = None
    downsample_norm: bool | None = None
    min_head_dim: int | None = None
    initial_mix: float = 1.0
    activation: Activation = "silu"
    dropout: float = 0.0
    lora_layers: int = 0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_attn_modules: tuple[AttentionLinear, ...] = ALL_ATTENTION
    apply_lora_to_mlp: bool = True
    lora_dropout: float = 0.0
    lora_rank_stabilized: bool = False

    def __post_init__(self) -> None:
        self._check_lora()
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                known = ", ".join(map(str, get_args(kind)))
                raise ValueError(f"{name}={value!r} is unknown; choose one of {known}")
        if self.hidden_bits not in (8, 16):
            raise ValueError(f"hidden_bits={self.hidden_bits} must be 16 or 8")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.rank is not None and self.rank < 1 and self.downsample not in _WITHOUT_RANK:
            raise ValueError(f"rank={self.rank} must be at least 1")
        for name in ("apply_lora_to_mlp", "lora_rank_stabilized"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if isinstance(self.initial_gamma, str):
            raise ValueError(f"initial_gamma={self.initial_gamma!r} must be a number")

    def _check_lora(self) -> None:
        for name in ("lora_layers", "lora_rank"):
            value, least = getattr(self, name), int(name == "lora_rank")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if isinstance(self.lora_attn_modules, str) or not isinstance(
            self.lora_attn_modules, Iterable
        ):
            raise ValueError(
                f"lora_attn_modules={self.lora_attn_modules!r} must be a list, such as "
                f"[{', '.join(ALL_ATTENTION)}]"
            )
        # A list in a config and in JSON.
        object.__setattr__(self, "lora_attn_modules", tuple(self.lora_attn_modules))
        unknown = sorted(set(map(str, self.lora_attn_modules)) - set(ALL_ATTENTION))
        if unknown:
            raise ValueError(
                f"lora_attn_modules={list(self.lora_attn_modules)}: {unknown[0]!r} is unknown; "
                f"choose from {', '.join(ALL_ATTENTION)}"
            )
        if type(self.lora_alpha) not in (int, float) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} must be a positive number")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be at least 0 and below 1")
        if self.lora_layers and not (self.lora_attn_modules or self.apply_lora_to_mlp):
            raise ValueError(
                f"lora_layers={self.lora_layers} trains nothing: lora_attn_modules is empty and "
                "apply_lora_to_mlp is False; set one of them, or lora_layers=0"
            )
        if self.num_side_blocks == 0 and not self.lora_layers:
            raise ValueError(
                "num_side_blocks=0 trains nothing without lora_layers; set one of them above 0"
            )

    def ineffective(self) -> list[str]:
        """Name settings of LoRA that differ from the defaults while no layer has LoRA."""
        differing = [] if self.lora_layers else list(self.settings())
        return [name for name in differing if "lora_" in name]

    @property
    def lora_scale(self) -> float:
        """s, the factor of each LoRA product."""
        rank = self.lora_rank**0.5 if self.lora_rank_stabilized else self.lora_rank
        return self.lora_alpha / rank

    @classmethod
    def of_block(cls, block: Mapping[str, Any]) -> "SideConfig":
        """Take the fields out of a config's model block."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in block.items() if name in names})

    def settings(self) -> dict[str, Any]:
        """Return r and what differs from the defaults, for a model block."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        differing = {
            n: v for n, v in values.items() if n == "reduction_factor" or v != _DEFAULTS[n]
        }
        return {n: list(v) if isinstance(v, tuple) else v for n, v in differing.items()}

    def resolved(self, width: int, num_layers: int) -> "SideConfig":
        """Fill in every None with what the variant fixes, for D = ``width`` and N layers."""
        preset = dict(VARIANTS[self.variant])
        preset["rank"] = min(preset["rank"], width)
        preset["num_side_blocks"] = min(preset["num_side_blocks"] or num_layers, num_layers)
        open_ones = {name: v for name, v in preset.items() if getattr(self, name) is None}
        return replace(self, **open_ones)


_DEFAULTS = {field.name: field.default for field in fields(SideConfig)}
_CHOICES = {
    "variant": Variant,
    "downsample": DownsampleKind,
    "output_mix": OutputMixKind,
    "activation": Activation,
}
_WITHOUT_RANK = ("linear", "maxpool", "avgpool")

# The fields as keyword arguments, for the signatures of builders.
SIDE_PARAMETERS = [
    parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for parameter in inspect.signature(SideConfig).parameters.values()
]
