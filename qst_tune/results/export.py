"""Write a tuned PEQA model as a Hugging Face directory, dense or in the GPTQ format."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict

from qst_tune.atomic_files import whole_directory
from qst_tune.backbone.directory import read_weights_file, weight_files
from qst_tune.backbone.transformers_models import PEQATransformer
from qst_tune.errors import UserError
from qst_tune.json_files import read_json
from qst_tune.modules.peqa_model import PEQADecoder, PEQAModel
from qst_tune.quantization.affine import AffineWeight
from qst_tune.quantization.gptq import GPTQFormat, fits_gptq, to_gptq
from qst_tune.results.hub_tensors import (
    IntegerRows,
    Tensors,
    decoded_rows,
    dense_tensors,
    integer_tensors,
)

ExportFormat = Literal["dense", "gptq", "gptq_v2"]
# Besides the weights, whatever a tokenizer or generation needs.
_COPIED = (".json", ".jinja", ".model", ".txt")

# Of group sizes that kernels run, the widest first.
_KERNEL_GROUPS = (128, 64, 32)


def export_model(
    model: PEQAModel,
    checkpoint_dir: Path,
    directory: Path,
    *,
    form: ExportFormat,
    dtype: torch.dtype,
) -> None:
    """Write the directory, whole or not at all.

    "dense" decodes the weights to ``dtype``: an ordinary model of full size. "gptq" and "gptq_v2"
    keep the codes, with everything else in fp16, for programs with integer kernels: a scale a
    channel is written once for each group of 128, 64 or 32 input channels, which they run.
    Tokenizer and other small files come from ``checkpoint_dir``, the directory that the model was
    loaded from; a result of the run is never overwritten.

    UserError if the directory exists or cannot be written, or the format cannot hold the model.
    """
    if directory.exists():
        raise UserError(
            f"{directory} exists; remove it or name another with export_dir=<directory>"
        )
    config = _read_config(model, checkpoint_dir)
    config.pop("quantization_config", None)  # of the directory whose scales were trained
    if form == "dense":
        tensors = dense_tensors(model, dtype)
        config.update(torch_dtype=str(dtype).removeprefix("torch."))
    else:
        kind: GPTQFormat = form
        dense, integers = integer_tensors(model, torch.float16)
        dense |= _decode_misfits(integers)
        size = None if _is_gptq_directory(model) else _group_size(integers)
        tensors = {**dense, **_to_gptq(integers, kind, size)}
        quantization = _gptq_config(dense, integers, kind, size)
        config.update(torch_dtype="float16", quantization_config=quantization)
    config.pop("dtype", None)  # transformers 5's name of torch_dtype
    if "text_config" in config:
        config["text_config"].pop("quantization_config", None)
        tensors |= _other_modalities(tensors, checkpoint_dir)
    _write(directory, tensors, config, checkpoint_dir)


def _read_config(model: PEQAModel, checkpoint_dir: Path) -> dict[str, Any]:
    config = read_json(checkpoint_dir / "config.json")
    if isinstance(model, PEQADecoder) and config.get("model_type") != "llama":
        raise UserError(
            f"{checkpoint_dir} has model_type {config.get('model_type')!r}; of torchtune's "
            "decoders only models of type 'llama' can be exported: use qst_tune.models.peqa_from_hf"
        )
    return config


def _to_gptq(integers: dict[str, IntegerRows], form: GPTQFormat, group_size: int | None) -> Tensors:
    """Lay all integer weights out; those with a scale a channel in groups, if there is a size."""
    tensors: Tensors = {}
    for name, (weight, linear) in integers.items():
        if linear.train_zero_points:
            raise UserError(
                "train_zero_points=True: such a model has no whole-numbered zero points, "
                "which GPTQ needs; use format=dense"
            )
        bits, width, in_dim = linear.layout
        if group_size is not None:
            repeated = (part.expand(-1, in_dim // group_size) for part in weight[1:])
            weight, width = AffineWeight(weight.codes, *repeated), group_size
        try:
            parts = to_gptq(
                weight, bits=bits, group_size=width, form=form, order=linear.input_order
            )
        except ValueError as error:
            raise UserError(f"format={form}: {name}: {error}") from error
        stem = name.removesuffix("weight")
        tensors |= {stem + part: value.cpu() for part, value in parts.items()}
    return tensors


def _decode_misfits(integers: dict[str, IntegerRows]) -> Tensors:
    """Take weights out that fill no whole words of GPTQ's format, as of Gemma 3n, if few do so."""
    misfits = {}
    for name, (weight, linear) in integers.items():
        bits, width, in_dim = linear.layout
        if not fits_gptq(len(weight.codes), in_dim, bits=bits, group_size=width):
            misfits[name] = decoded_rows(integers[name]).half().cpu()
    if 2 * len(misfits) > len(integers):  # a group size that fits no weight: refused by name
        return {}
    for name in misfits:
        del integers[name]
    return misfits


def _is_gptq_directory(model: PEQAModel) -> bool:
    """Whether the codes are a GPTQ directory's, whose readers run its groups."""
    stored = model.backbone.stored if isinstance(model, PEQATransformer) else None
    return stored is not None and (stored.own or "").endswith("gptq")


def _group_size(integers: dict[str, IntegerRows]) -> int | None:
    """How wide groups must be written that repeat a channel's scale; None: they stay as they are.

    Kernels for GPTQ's format run groups of 32 to 128, and no row as one group: UserError where the
    widths allow none of those.
    """
    layouts = {rows.linear.layout for rows in integers.values()}
    if any(layout.num_groups > 1 for layout in layouts):
        return None
    widths = {layout.in_dim for layout in layouts}
    size = next((g for g in _KERNEL_GROUPS if all(w % g == 0 for w in widths)), None)
    if size is None:
        raise UserError(
            f"the model's widths {sorted(widths)} are no multiples of {_KERNEL_GROUPS[-1]}: no "
            "program runs such GPTQ groups; use format=dense"
        )
    return size


def _gptq_config(
    dense: Tensors, integers: dict[str, IntegerRows], form: GPTQFormat, group_size: int | None
) -> dict[str, Any]:
    linears = [rows.linear for rows in integers.values()]
    layouts = [linear.layout for linear in linears]
    own = max(layout.group_size for layout in layouts)
    per_channel = all(layout.num_groups == 1 for layout in layouts)
    config = {
        "quant_method": "gptq",
        "bits": layouts[0].bits,
        "group_size": group_size or (-1 if per_channel else own),
        "desc_act": any(linear.input_order is not None for linear in linears),
        "sym": False,
        "lm_head": False,
        "checkpoint_format": form,
    }
    # Routers and misfits: a reader must not look for their codes.
    names = [name.removesuffix(".weight") for name, weight in dense.items() if weight.ndim == 2]
    patterns = {re.sub(r"\d+", "[0-9]+", re.escape(n)) for n in names if re.search(r"\.\d+\.", n)}
    if patterns:
        config["dynamic"] = {f"-:^{pattern}$": {} for pattern in sorted(patterns)}
    return config


def _other_modalities(tensors: Tensors, checkpoint_dir: Path) -> Tensors:
    """The other parts of a vision-language model than its text, as its directory has them."""
    stems = {name.rpartition(".")[0] for name in tensors}
    found: Tensors = {}
    missing = set(stems)
    for path in weight_files(checkpoint_dir):
        for name, tensor in read_weights_file(path).items():
            stem = name.rpartition(".")[0]
            missing.discard(stem)
            if stem not in stems:
                found[name] = tensor
    if missing:
        raise UserError(
            f"{checkpoint_dir} names the weights of its text otherwise than transformers writes "
            f"them, for example {min(missing)}: it cannot be exported with the other modalities"
        )
    return found


def _write(directory: Path, tensors: Tensors, config: dict[str, Any], source: Path) -> None:
    with whole_directory(directory) as aside:
        for path in source.iterdir():
            is_about_weights = path.name.endswith((".index.json", "quantize_config.json"))
            if path.suffix in _COPIED and not is_about_weights:
                shutil.copyfile(path, aside / path.name)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        whole = {name: _whole(tensors.pop(name)) for name in list(tensors)}
        save_torch_state_dict(whole, aside, max_shard_size="4GB", metadata={"format": "pt"})


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with a storage of its own, which safetensors wants: not a part of all experts."""
    is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_part else tensor.contiguous()
