"""What a side network computes that the names and shapes of its tensors leave open."""

from typing import Any

from qst_tune.modules.downsample import Downsample, LowRankDownsample, PoolDownsample
from qst_tune.modules.output_mix import SigmoidMix
from qst_tune.modules.side_network import SideNetwork


def side_structure(side: SideNetwork) -> dict[str, Any]:
    """Describe a side network beside its tensors.

    A folder says this, and a model that differs refuses it: one head of 36 and three heads of 12
    have the same tensors. What acts in training alone (dropout, initial values) is not in it, nor
    ``hidden_bits``, which approximates the same function.

    Args:
        side (SideNetwork): may be on the meta device.

    Returns:
        dict[str, Any]: of what JSON has; the same for two side networks that compute the same from
        the same tensors and backbone.
    """
    attn: Any = side.blocks[0].attn
    downsample: Any = side.downsample[0]
    return {
        "reads": "output",  # of a layer; directories of older versions may say "input"
        "layers": side.layers,
        "normalize_hidden": side.normalize_hidden,
        "num_heads": attn.num_heads,
        "num_kv_heads": attn.num_kv_heads,
        "downsample": _downsample(downsample),
        "output_mix": _output_mix(side.output_mix),
    }


def _downsample(downsample: Downsample) -> str:
    name = type(downsample).__name__
    if isinstance(downsample, LowRankDownsample):
        return f"{name}, {type(downsample.activation).__name__}"
    return f"{name}, {downsample.kind}" if isinstance(downsample, PoolDownsample) else name


def _output_mix(mix: Any) -> str:
    swapped = isinstance(mix, SigmoidMix) and mix.swapped
    return type(mix).__name__ + (", swapped" if swapped else "")
