"""Write a tuned PEQA model as a Hugging Face folder, dense or in the GPTQ format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import save_torch_state_dict
from torchtune.models.convert_weights import tune_to_hf

from qst_tune.errors import UserError
from qst_tune.modules.peqa_decoder import PEQADecoder
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.stretched_rope import StretchedRoPE
from qst_tune.quantization.affine import AffineWeight
from qst_tune.quantization.gptq import GPTQFormat, to_gptq
from qst_tune.quantization.table import QuantizedTable
from qst_tune.training.atomic_folder import whole_folder

ExportFormat = Literal["dense", "gptq", "gptq_v2"]
# Beside the weights, whatever a tokenizer or a generation needs.
_COPIED = (".json", ".jinja", ".model", ".txt")

_Tensors = dict[str, torch.Tensor]
# From a linear and the order of its rows in the Hugging Face model to its tensors by name.
_LinearExport = Callable[[PEQALinear, torch.Tensor], _Tensors]


def export_model(
    model: PEQADecoder,
    checkpoint_dir: Path,
    folder: Path,
    *,
    form: ExportFormat,
    dtype: torch.dtype,
) -> None:
    """Write the folder, whole or not at all.

    "dense" decodes the weights to ``dtype``: an ordinary model of full size. "gptq" and "gptq_v2"
    keep the codes, with scales in fp16, for programs with integer kernels. Tokenizer and other
    small files come from the checkpoint; a result of the run is never overwritten.

    Args:
        model (PEQADecoder): tuned.
        checkpoint_dir (Path): the Hugging Face folder that it was loaded from, of type "llama".
        folder (Path): must not exist.
        form (ExportFormat): "dense", "gptq" or "gptq_v2".
        dtype (torch.dtype): of a dense model's weights. The others are in fp16.

    Raises:
        UserError: if the folder exists or cannot be written, or the format cannot hold the model.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; remove it or name another with export_dir=<folder>")
    config = _read_config(checkpoint_dir)
    config.pop("quantization_config", None)  # of the directory whose scales were trained
    _check_convertible(model)
    if form == "dense":
        tensors = _tensors(model, dtype, lambda linear, rows: _dense(linear, rows, dtype))
        config.update(torch_dtype=str(dtype).removeprefix("torch."))
    else:
        kind: GPTQFormat = form
        tensors = _tensors(model, torch.float16, lambda linear, rows: _gptq(linear, rows, kind))
        quantization = _gptq_config(model, kind)
        config.update(torch_dtype="float16", quantization_config=quantization)
    config.pop("dtype", None)  # transformers 5's name of torch_dtype
    _write(folder, tensors, config, checkpoint_dir)


def check_export_format(form: Any) -> ExportFormat:
    """Check the name of a format.

    Args:
        form (Any): from a config.

    Returns:
        ExportFormat: the same.

    Raises:
        UserError: if it is unknown.
    """
    if form not in get_args(ExportFormat):
        raise UserError(f"format={form} is unknown: use {', '.join(get_args(ExportFormat))}")
    known: ExportFormat = form
    return known


def _read_config(checkpoint_dir: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((checkpoint_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint_dir}/config.json cannot be read: {error}") from error
    if config.get("model_type") != "llama":
        raise UserError(
            f"{checkpoint_dir} has model_type {config.get('model_type')!r}; only models of type "
            "'llama' can be exported"
        )
    return config


def _check_convertible(model: PEQADecoder) -> None:
    """Refuse what torchtune's conversion to Hugging Face's names does not know."""
    if isinstance(model.layers[0].attn.pos_embeddings, StretchedRoPE):
        raise UserError("a model with this rope_scaling cannot be exported yet")
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if biases:
        raise UserError(f"a model with biases ({biases[0]}) cannot be exported yet")


def _tensors(model: PEQADecoder, dtype: torch.dtype, export_linear: _LinearExport) -> _Tensors:
    """The whole model under Hugging Face names."""
    linears = {n: m for n, m in _unwrapped_modules(model) if isinstance(m, PEQALinear)}
    inside = tuple(f"{name}." for name in linears)
    others = {
        name: tensor.dense(dtype) if isinstance(tensor, QuantizedTable) else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside)
    }
    tensors = _to_hf(model, others)
    for name, linear in linears.items():
        # torchtune turns rows of q and k around for its rotary embeddings; numbers show how.
        numbers = torch.arange(linear.out_features, dtype=torch.int32)
        numbered = {f"{name}.weight": numbers[:, None].expand(linear.weight_shape)}
        ((hf_name, rows),) = _to_hf(model, numbered).items()
        exported = export_linear(linear, rows[:, 0].long().to(linear.codes.device))
        tensors |= {hf_name.removesuffix("weight") + k: v.cpu() for k, v in exported.items()}
    return tensors


def _unwrapped_modules(model: PEQADecoder) -> list[tuple[str, torch.nn.Module]]:
    return [(n.replace("_checkpoint_wrapped_module.", ""), m) for n, m in model.named_modules()]


def _to_hf(model: PEQADecoder, tensors: _Tensors) -> _Tensors:
    attention = model.layers[0].attn
    converted: _Tensors = tune_to_hf(
        tensors,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        dim=attention.embed_dim,
        head_dim=attention.head_dim,
    )
    return converted


def _dense(linear: PEQALinear, rows: torch.Tensor, dtype: torch.dtype) -> _Tensors:
    return {"weight": linear.dense_weight(dtype)[rows]}


def _gptq(linear: PEQALinear, rows: torch.Tensor, form: GPTQFormat) -> _Tensors:
    if linear.train_zero_points:
        raise UserError(
            "train_zero_points=True: such a model has no whole-numbered zero points, "
            "which GPTQ needs; use format=dense"
        )
    weight = AffineWeight(*(part[rows] for part in linear.affine_weight()))
    bits, group_size, _ = linear.layout
    try:
        return to_gptq(
            weight, bits=bits, group_size=group_size, form=form, order=linear.input_order
        )
    except ValueError as error:
        raise UserError(f"format={form}: {error}") from error


def _gptq_config(model: PEQADecoder, form: GPTQFormat) -> dict[str, Any]:
    linears = [m for m in model.modules() if isinstance(m, PEQALinear)]
    layouts = [linear.layout for linear in linears]
    per_channel = all(layout.num_groups == 1 for layout in layouts)
    return {
        "quant_method": "gptq",
        "bits": layouts[0].bits,
        "group_size": -1 if per_channel else max(layout.group_size for layout in layouts),
        "desc_act": any(linear.input_order is not None for linear in linears),
        "sym": False,
        "lm_head": False,
        "checkpoint_format": form,
    }


def _write(folder: Path, tensors: _Tensors, config: dict[str, Any], source: Path) -> None:
    with whole_folder(folder) as aside:
        for path in source.iterdir():
            is_about_weights = path.name.endswith((".index.json", "quantize_config.json"))
            if path.suffix in _COPIED and not is_about_weights:
                shutil.copyfile(path, aside / path.name)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if "quantization_config" in config:  # where AutoGPTQ and older readers look
            quantization = json.dumps(config["quantization_config"], indent=2)
            (aside / "quantize_config.json").write_text(quantization + "\n")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_torch_state_dict(contiguous, aside, max_shard_size="4GB", metadata={"format": "pt"})
