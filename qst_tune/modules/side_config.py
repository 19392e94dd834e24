"""Everything that shapes a side network, in one place."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from qst_tune.modules.downsample import Activation, DownsampleKind
from qst_tune.modules.output_mix import OutputMixKind

Variant = Literal["default", "paper", "authors"]


@dataclass(frozen=True)
class SideConfig:
    """What shapes a side network."""

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
    downsample_norm_before: bool = False
    dropout: float = 0.0

    @classmethod
    def of_block(cls, block: dict[str, Any]) -> "SideConfig":
        """Take the settings out of a model block."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in block.items() if name in names})

    def settings(self) -> dict[str, Any]:
        """Return what differs from the defaults, with the reduction factor."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name == "reduction_factor" or getattr(self, field.name) != field.default
        }
