"""Which rotary embedding a ``config.json`` asks for."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings

from qst_tune.models.hf.config import HFConfig
from qst_tune.modules.stretched_rope import StretchedRoPE

_EVERYWHERE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_ORIGINAL = "original_max_position_embeddings"
# Kind of scaling -> its further settings, all that we read.
_SETTINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
    "yarn": frozenset(
        {
            *("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate"),
            *("mscale", "mscale_all_dim"),
        }
    ),
    "longrope": frozenset({"factor", "short_factor", "long_factor", "attention_factor", _ORIGINAL}),
}


@dataclass(frozen=True)
class Rope:
    """What a ``config.json`` says of positions.

    Args:
        kind (str): of scaling, one of transformers' names.
        base (float): of the frequencies.
        partial (float): share of a head's channels that turn.
        longest (int): positions up to which the embedding is this one.
        factor (float): of the scaling.
        settings (dict[str, Any]): of the scaling.
    """

    kind: str
    base: float
    partial: float
    longest: int
    factor: float
    settings: dict[str, Any]


def read_rope(config: HFConfig, default_original: int | None = None) -> Rope:
    """Read the settings of the rotary embedding, where either version of transformers writes them.

    Args:
        config (HFConfig): of a model with rotary embeddings.
        default_original (int | None): the family's ``original_max_position_embeddings``.

    Returns:
        Rope: checked.

    Raises:
        UserError: if the scaling, or a setting of it, is not known.
    """
    scaling = config.take("rope_scaling")
    parameters = config.take("rope_parameters")  # transformers 5
    settings = scaling or parameters or {}
    if not isinstance(settings, dict):
        raise config.problem(f"rope_scaling={settings!r} must be an object")
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    kind = "longrope" if kind == "su" else kind  # its name in the first Phi-3
    # What stands among the settings goes before what stands beside them, but for the last.
    outer_base = config.number("rope_theta", 10_000.0)
    outer_partial = config.number("partial_rotary_factor", 1.0)
    longest = config.whole("max_position_embeddings")
    _check_settings(config, kind, settings)
    original = config.take(_ORIGINAL, default_original) or settings.get(_ORIGINAL) or longest
    settings = {**settings, _ORIGINAL: original}
    return Rope(
        kind=kind,
        base=float(settings.get("rope_theta") or outer_base),
        partial=float(settings.get("partial_rotary_factor") or outer_partial),
        # LongRoPE changes its frequencies for rows that are longer, "dynamic" beyond the longest.
        longest=min(longest, original) if kind == "longrope" else longest,
        factor=float(settings.get("factor") or longest / original),
        settings=settings,
    )


def _check_settings(config: HFConfig, kind: str, settings: dict[str, Any]) -> None:
    if kind not in _SETTINGS:
        known = ", ".join(_SETTINGS)
        raise config.problem(f"rope_scaling of type {kind!r} is not supported, only {known}")
    for name, value in settings.items():
        if value is None or name in ("rope_type", "type"):
            continue
        if name not in _EVERYWHERE | _SETTINGS[kind]:
            raise config.problem(f"rope_scaling of type {kind!r}: {name}={value!r} is not known")
        numbers = value if name.endswith(("short_factor", "long_factor")) else [value]
        if not isinstance(numbers, list) or not all(isinstance(n, int | float) for n in numbers):
            raise config.problem(f"rope_scaling: {name}={value!r} must be numbers")
    needed = {
        "linear": "factor",
        "dynamic": "factor",
        "llama3": "factor",
        "longrope": "short_factor",
    }
    if kind in needed and settings.get(needed[kind]) is None:
        raise config.problem(f"rope_scaling of type {kind!r} needs {needed[kind]}")


def can_turn_neighbours(rope: Rope) -> bool:
    """Tell whether torchtune has this embedding as one that turns neighbouring channels.

    Args:
        rope (Rope): from :func:`read_rope`.

    Returns:
        bool: False where only one that turns channels half a head apart will do.
    """
    return rope.partial == 1 and rope.kind in ("default", "dynamic", "llama3")


def neighbours_rope(
    rope: Rope, head_dim: int, max_seq_len: int, *, like_llama3: bool = False
) -> nn.Module:
    """Build one of torchtune's for Llama, which turn neighbouring channels.

    Args:
        rope (Rope): one that :func:`can_turn_neighbours`.
        head_dim (int): width of a head.
        max_seq_len (int): positions, at most ``rope.longest``.
        like_llama3 (bool): unscaled, take Llama 3's with a factor of 1. It rounds differently, and
            torchtune's builder of tied Llamas has it, so runs are the same to the last digit.

    Returns:
        nn.Module: takes ``[B, T, H, head_dim]`` and ``input_pos``.
    """
    if rope.kind == "llama3" or (rope.kind == "default" and like_llama3):
        return _llama3(rope, head_dim, max_seq_len)
    plain: nn.Module = RotaryPositionalEmbeddings(head_dim, max_seq_len, rope.base)
    return plain


def halves_rope(rope: Rope, head_dim: int, max_seq_len: int) -> nn.Module:
    """Build one that turns channels half a head apart, as transformers does.

    Args:
        rope (Rope): any.
        head_dim (int): width of a head.
        max_seq_len (int): positions, at most ``rope.longest``.

    Returns:
        nn.Module: takes ``[B, T, H, head_dim]`` and ``input_pos``.
    """
    if rope.partial == 1 and rope.kind in ("default", "dynamic"):
        plain: nn.Module = Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, rope.base)
        return plain
    return _stretched(rope, int(head_dim * rope.partial), max_seq_len)


def _llama3(rope: Rope, head_dim: int, max_seq_len: int) -> nn.Module:
    is_scaled = rope.kind == "llama3"
    settings = rope.settings if is_scaled else {}
    scaled: nn.Module = Llama3ScaledRoPE(
        dim=head_dim,
        max_seq_len=max_seq_len,
        base=rope.base,
        scale_factor=rope.factor if is_scaled else 1,
        low_freq_factor=settings.get("low_freq_factor", 1),
        high_freq_factor=settings.get("high_freq_factor", 4),
        old_context_len=settings.get(_ORIGINAL, 8192),
    )
    return scaled


def _stretched(rope: Rope, dim: int, max_seq_len: int) -> nn.Module:
    return StretchedRoPE(
        dim,
        max_seq_len,
        rope.base,
        divisors=_divisors(rope, dim),
        attention_factor=_attention_factor(rope),
    )


def _divisors(rope: Rope, dim: int) -> list[float] | None:
    """By how much each frequency is stretched."""
    if rope.kind == "linear":
        return [rope.factor] * (dim // 2)
    if rope.kind == "llama3":
        return _llama3_divisors(rope, dim)
    if rope.kind == "yarn":
        return _yarn_divisors(rope, dim)
    if rope.kind == "longrope":
        return [float(factor) for factor in rope.settings["short_factor"]]
    return None


def _llama3_divisors(rope: Rope, dim: int) -> list[float]:
    """Long waves are stretched by the factor, short ones not, those between by a share of it."""
    low = rope.settings.get("low_freq_factor", 1)
    high = rope.settings.get("high_freq_factor", 4)

    def divisor(frequency: float) -> float:
        turns = rope.settings[_ORIGINAL] * frequency / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        return float(1 / ((1 - share) / rope.factor + share))

    return [divisor(rope.base ** (-2 * i / dim)) for i in range(dim // 2)]


def _yarn_divisors(rope: Rope, dim: int) -> list[float]:
    """As transformers' ``_compute_yarn_parameters``."""
    settings = rope.settings

    def index_of(turns: float) -> float:
        """Of the frequency that turns so often within the original length."""
        waves = settings[_ORIGINAL] / (turns * 2 * math.pi)
        return dim * math.log(waves) / (2 * math.log(rope.base))

    first, last = (
        index_of(settings.get("beta_fast") or 32),
        index_of(settings.get("beta_slow") or 1),
    )
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    stretched = [min(max((i - first) / width, 0.0), 1.0) for i in range(dim // 2)]
    return [1 / (share / rope.factor + 1 - share) for share in stretched]


def _attention_factor(rope: Rope) -> float:
    given = rope.settings.get("attention_factor")
    if given is not None:
        return float(given)
    if rope.kind == "yarn":
        of_value, of_all = rope.settings.get("mscale"), rope.settings.get("mscale_all_dim")
        if of_value and of_all:
            return _yarn_scale(rope.factor, of_value) / _yarn_scale(rope.factor, of_all)
        return _yarn_scale(rope.factor, 1)
    if rope.kind == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.settings[_ORIGINAL]))
    return 1.0


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
