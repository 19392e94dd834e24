"""Tiny models in directories of other programs' quantised formats."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.reference import stored_formats as formats
from tests.support.model_types import tiny_model

CT_GROUP = {"targets": ["Linear"]}


def _compressed(kind: str, bits: int, **weights: Any) -> dict[str, Any]:
    group = {**CT_GROUP, "weights": {"type": kind, "num_bits": bits, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def _gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, **changes}


_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

# By name: the config's block, and what writes a linear.
FORMATS: dict[str, tuple[dict[str, Any], Callable[..., formats.Linear]]] = {
    "bnb_nf4": (_BNB, formats.bnb_4bit),
    "bnb_nf4_plain": (_BNB, partial(formats.bnb_4bit, nested=False)),
    "bnb_fp4": (
        {**_BNB, "bnb_4bit_quant_type": "fp4"},
        partial(formats.bnb_4bit, quant_type="fp4"),
    ),
    "bnb_int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, formats.bnb_8bit),
    "gptq": (_gptq(), formats.gptq),
    "gptq_sym": (_gptq(sym=True), partial(formats.gptq, sym=True)),
    "gptq_v2_channel": (
        _gptq(checkpoint_format="gptq_v2", group_size=-1),
        partial(formats.gptq, form="gptq_v2", group_size=-1),
    ),
    "gptq_act_order": (_gptq(desc_act=True), partial(formats.gptq, act_order=True)),
    "gptq_3bit": (_gptq(bits=3), partial(formats.gptq, bits=3)),
    "gptq_8bit": (_gptq(bits=8), partial(formats.gptq, bits=8)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, formats.awq),
    "ct_int4": (_compressed("int", 4, group_size=32), formats.pack_quantized),
    "ct_int4_asym": (
        _compressed("int", 4, group_size=32),
        partial(formats.pack_quantized, symmetric=False),
    ),
    "ct_int8": (_compressed("int", 8), formats.int_quantized),
    "ct_fp8": (
        _compressed("float", 8),
        partial(formats.float8, block=None, name="weight_scale"),
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, formats.float8),
}
SIZES = {"num_hidden_layers": 2, "tie_word_embeddings": False}


def save_stored(
    directory: Path, model_type: str, form: str, *, left_out: tuple[str, ...] = (), **changes: Any
) -> Any:
    """Write a directory in a format; returns transformers' model over the dense weights, fp32."""
    settings, write = FORMATS[form]
    model = tiny_model(model_type, **{**SIZES, **changes})
    dense_directory = directory / "dense"
    model.save_pretrained(dense_directory)
    dense = load_file(dense_directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in dense.items():
        stem = name.removesuffix(".weight")
        if not _is_linear(name, weight) or any(part in name for part in left_out):
            tensors[name] = weight
            continue
        parts, dense[name] = write(*weight.shape, generator)
        tensors |= {f"{stem}.{part}": value for part, value in parts.items()}
    write_directory(directory, dense_directory, tensors, settings)
    save_file(dense, dense_directory / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(dense_directory, dtype=torch.float32).eval()


def _is_linear(name: str, weight: torch.Tensor) -> bool:
    return ".layers." in name and weight.ndim == 2 and not name.endswith("mlp.gate.weight")


def write_directory(
    directory: Path,
    dense_directory: Path,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
) -> None:
    config = json.loads((dense_directory / "config.json").read_text())
    config["quantization_config"] = settings
    (directory / "config.json").write_text(json.dumps(config))
    contiguous = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})


def save_mxfp4(directory: Path) -> Any:
    """Write a tiny gpt-oss as OpenAI did, with experts in MXFP4; returns the dense one."""
    model = tiny_model("gpt_oss", **SIZES)
    dense_directory = directory / "dense"
    model.save_pretrained(dense_directory)
    dense = load_file(dense_directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in dense.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight
            continue
        num_experts, in_dim, out_dim = weight.shape
        parts, dense[name] = formats.mxfp4((num_experts, out_dim, in_dim), generator)
        tensors |= {f"{name}_{part}": value for part, value in parts.items()}
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": left_out}
    write_directory(directory, dense_directory, tensors, settings)
    contiguous = {name: value.contiguous() for name, value in dense.items()}
    save_file(contiguous, dense_directory / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(dense_directory, dtype=torch.float32).eval()
