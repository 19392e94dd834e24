"""Each ``quant_method`` of a ``quantization_config``: how its directories store weights."""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qst_tune.backbone.stored_weights import Decode, DirectoryFormat, Layout
from qst_tune.errors import UserError
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.awq import from_awq
from qst_tune.quantization.bitsandbytes import from_signed, read_bnb_4bit, read_bnb_8bit
from qst_tune.quantization.compressed_tensors import from_pack_quantized
from qst_tune.quantization.float_formats import decode_float8, read_mxfp4
from qst_tune.quantization.gptq import GPTQFormat, from_gptq
from qst_tune.quantization.stored import Stored, StoredFloat, StoredTransposed

_Tensors = dict[str, torch.Tensor]
_Settings = dict[str, Any]
Skips = Callable[[str], bool]  # whether a module of this name is not quantised


def read_directory_format(path: Path, settings: Any) -> DirectoryFormat:
    """Read a ``quantization_config`` of the ``config.json`` at ``path``.

    UserError if weights stored in this way cannot be read.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and "load_in_4bit" in settings:
        method = "bitsandbytes"  # as bitsandbytes wrote it before the key was there
    if method not in _METHODS:
        raise UserError(
            f"{path}: quantization_config.quant_method={method!r} is not supported, only "
            f"{', '.join(_METHODS)}; name a directory of the model in one of these, or one that is "
            "not quantised"
        )
    try:
        return _METHODS[method](settings)
    except ValueError as error:
        raise UserError(f"{path}: quantization_config: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: quantization_config of {method} is damaged: {type(error).__name__} {error}"
        ) from error


def _bitsandbytes(settings: _Settings) -> DirectoryFormat:
    skips = _skipper(settings.get("llm_int8_skip_modules"))
    if settings.get("load_in_8bit"):
        layout = Layout(".weight", ".SCB", (".weight", ".SCB"))
        return _integers("bitsandbytes", 8, None, (layout,), read_bnb_8bit, skips)
    own = settings.get("bnb_4bit_quant_type", "fp4")
    _choose("bnb_4bit_quant_type", own, ("nf4", "fp4"))
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    states = (f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    parts = (".weight", *(f".weight.{name}" for name in (*names, *states)))
    return DirectoryFormat(
        f"bitsandbytes {own}",
        (Layout(".weight", ".weight.absmax", parts),),
        read_bnb_4bit,
        own,
        partial(NF4Linear, quant_type=own),
        skips,
    )


def _gptq(settings: _Settings) -> DirectoryFormat:
    form: GPTQFormat = settings.get("checkpoint_format") or "gptq"
    if settings.get("is_marlin_format"):
        raise ValueError("is_marlin_format is not supported: its codes are laid out for one kernel")
    _choose("checkpoint_format", form, ("gptq", "gptq_v2"))
    bits, group_size = int(settings["bits"]), int(settings.get("group_size", 128))
    _choose("bits", bits, (2, 3, 4, 8))

    def decode(parts: _Tensors) -> Stored:
        return from_gptq(parts, bits=_gptq_bits(parts), form=form, group_size=max(0, group_size))

    layout = Layout(".qweight", ".scales", (".qweight", ".qzeros", ".scales", ".g_idx"))
    return _integers("GPTQ", bits, group_size, (layout,), decode, _gptq_skips(settings))


def _gptq_bits(parts: _Tensors) -> int:
    """Of this very weight: GPTQModel's ``dynamic`` may give it others than the config's."""
    return int(parts["qzeros"].shape[1] * 32 // parts["scales"].shape[1])


def _gptq_skips(settings: _Settings) -> Skips:
    listed = settings.get("modules_in_block_to_quantize") or ()
    inside = [n for names in listed for n in ([names] if isinstance(names, str) else names)]
    left_out = [p[2:] for p in settings.get("dynamic") or {} if p.startswith("-:")]

    def skips(name: str) -> bool:
        if inside and not any(name.endswith(f".{end}") for end in inside):
            return True
        return any(re.match(pattern, name) for pattern in left_out)

    return skips


def _awq(settings: _Settings) -> DirectoryFormat:
    _choose("version", str(settings.get("version", "gemm")).lower(), ("gemm",))
    _choose("bits", settings.get("bits", settings.get("w_bit")), (4,))
    group_size = int(settings.get("group_size") or settings.get("q_group_size") or 128)
    layout = Layout(".qweight", ".scales", (".qweight", ".qzeros", ".scales"))
    skips = _skipper(settings.get("modules_to_not_convert"))
    return _integers("AWQ", 4, group_size, (layout,), from_awq, skips)


def _compressed_tensors(settings: _Settings) -> DirectoryFormat:
    if settings.get("transform_config"):
        raise ValueError("transform_config (rotated weights) is not supported")
    groups = list(settings["config_groups"].values())
    kinds = {(g["weights"]["type"], g["weights"]["num_bits"]) for g in groups}
    if len(kinds) != 1:
        raise ValueError(f"config_groups of {len(kinds)} formats in one model are not supported")
    ((kind, bits),) = kinds
    skips = _skipper(settings.get("ignore"), is_regex=True)
    weights = groups[0]["weights"]
    if kind == "float":
        _choose("num_bits of a float", bits, (8,))
        block = weights.get("block_structure")
        return _float8("compressed-tensors FP8", "weight_scale", block, skips)
    _choose("num_bits", bits, (4, 8))
    names = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    parts = tuple(f".{name}" for name in (*names, "weight_g_idx"))
    layouts = tuple(Layout(main, ".weight_scale", parts) for main in (".weight_packed", ".weight"))
    group_size = weights.get("group_size") or -1
    decode = partial(_decode_compressed, bits=bits, group_size=max(0, group_size))
    return _integers("compressed-tensors", bits, group_size, layouts, decode, skips)


def _decode_compressed(parts: _Tensors, *, bits: int, group_size: int) -> Stored:
    if "weight_packed" in parts:
        return from_pack_quantized(parts, bits=bits, group_size=group_size)
    if parts["weight"].dtype != torch.int8 or "weight_zero_point" in parts:
        raise ValueError(f"{parts['weight'].dtype} weights with zero points are not supported")
    out_dim, scale = len(parts["weight"]), parts["weight_scale"]
    scale = scale.expand(out_dim, 1) if scale.numel() == 1 else scale.reshape(out_dim, -1)
    return from_signed(parts["weight"], scale)


def _fp8(settings: _Settings) -> DirectoryFormat:
    block = settings.get("weight_block_size")
    shape = f"blocks of {block[0]} x {block[1]}" if block else "one scale a weight"
    skips = _skipper(settings.get("modules_to_not_convert"))
    return _float8(f"FP8, {shape}", "weight_scale_inv", block, skips)


def _fbgemm_fp8(settings: _Settings) -> DirectoryFormat:
    skips = _skipper(settings.get("modules_to_not_convert"))
    return _float8("FP8, one scale a channel", "weight_scale", None, skips)


def _float8(title: str, scale: str, block: Any, skips: Skips) -> DirectoryFormat:
    """FP8 codes with scales: one a weight or a channel, or one for each block of this shape."""
    if isinstance(block, str):  # "128x128", of older compressed-tensors
        block = block.split("x")
    sizes = None if block is None else (int(block[0]), int(block[1]))

    def decode(parts: _Tensors) -> Stored:
        return StoredFloat(decode_float8(parts["weight"], parts[scale], sizes))

    layout = Layout(".weight", f".{scale}", (".weight", f".{scale}"))
    return DirectoryFormat(title, (layout,), decode, None, NF4Linear, skips)


def _mxfp4(settings: _Settings) -> DirectoryFormat:
    layout = Layout("_blocks", "_scales", ("_blocks", "_scales"), target="")
    skips = _skipper(settings.get("modules_to_not_convert"))
    return DirectoryFormat("MXFP4", (layout,), _read_mxfp4, "mxfp4", _mxfp4_linear, skips)


def _mxfp4_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    linear = NF4Linear(weight, bias)  # of other levels
    linear.quantization = "mxfp4"
    return linear


def _read_mxfp4(parts: _Tensors) -> list[Stored]:
    # gpt-oss stores experts [E, out, in] as codes and has them as [E, in, out].
    experts = zip(parts["blocks"], parts["scales"], strict=True)
    return [StoredTransposed(read_mxfp4(*expert)) for expert in experts]


_METHODS: dict[str, Callable[[_Settings], DirectoryFormat]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4,
}


def _integers(
    program: str,
    bits: int,
    group_size: int | None,
    layouts: tuple[Layout, ...],
    decode: Decode,
    skips: Skips,
) -> DirectoryFormat:
    """Integers of a program, taken over into our own integer linear."""
    size = None if group_size is None or group_size < 1 else group_size
    kind = f"int{bits}, {'per channel' if size is None else f'groups of {size}'}"
    own = f"{kind}, {program.lower()}"

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        with warnings.catch_warnings():  # 2 bits were the directory's choice
            warnings.simplefilter("ignore")
            linear = PEQALinear(weight, bias, bits=bits, group_size=size)
        linear.quantization = own
        return linear

    return DirectoryFormat(f"{program} {kind}", layouts, decode, own, make, skips)


def _choose(key: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ValueError(f"{key}={value} is not supported, only {', '.join(map(str, known))}")


def _skipper(names: Sequence[str] | None, *, is_regex: bool = False) -> Skips:
    """Whether a list of modules that are not quantised has a name, as each writer means it."""
    patterns = list(names or ())

    def skips(name: str) -> bool:
        if is_regex:
            return any(
                re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns
            )
        from transformers.quantizers.quantizers_utils import should_convert_module

        return not should_convert_module(name, patterns)

    return skips
