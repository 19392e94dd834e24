"""Fill a frozen backbone from a checkpoint, weight by weight, quantising on the way."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune import training
from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder

from qst_tune.backbone.directory import weight_files
from qst_tune.backbone.identity import Fingerprint, WeightDigests, fingerprint_files
from qst_tune.backbone.loading import check_same, load_transformers_backbone
from qst_tune.backbone.repair import Repairs, repair_rank_of
from qst_tune.backbone.transformers import transformers_backbone
from qst_tune.backbone.transformers_models import TransformersModel
from qst_tune.errors import UserError
from qst_tune.json_files import read_json
from qst_tune.modules.backbone_formats import QuantizedLinear, quantization_of_backbone
from qst_tune.modules.meta_device import build_rotary_caches
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.qst_model import is_side
from qst_tune.modules.repair import Repair
from qst_tune.quantization.table import QuantizedTable, quantize_table
from qst_tune.torchtune_compat import checkpoint_directory, checkpoint_paths, take_paths


def load_backbone(
    model: Any, checkpointer: Any, *, dtype: torch.dtype, device: torch.device
) -> Fingerprint:
    """Load a checkpoint into the backbone of a model that was built on the meta device.

    One file of the checkpoint is open at a time, and each of its weights is quantised, moved and
    dropped before the next: the whole unquantised model is never in memory. For a repair all are
    read twice. A side network stays as it is. ``dtype`` is that of what is not quantised, and of
    decoded values. Returns the fingerprint of the checkpoint's weights. UserError if a weight is
    missing, is one too many or has another shape.
    """
    backbone = transformers_backbone(model)
    if backbone is not None:
        directory = checkpoint_directory(checkpointer)
        return load_transformers_backbone(backbone, directory, dtype=dtype, device=device)
    place = partial(set_weight, model, dtype=dtype, device=device)
    of_weights = read_weights(model, checkpointer, place)
    build_rotary_caches(model.layers, device)
    repair_rank = repair_rank_of(model)
    if repair_rank:
        directory = checkpoint_directory(checkpointer)
        repairs = Repairs(model, model.backbone, directory, repair_rank)
        repairs.finish(of_weights, read_weights(model, checkpointer, repairs.take))
    return of_weights


def stored_as(model: Any) -> str:
    """Name how a model's backbone is stored, as ``quantization_of_backbone`` does."""
    backbone = transformers_backbone(model)
    return quantization_of_backbone(model) if backbone is None else backbone.quantization


def fingerprint_backbone(model: Any, checkpointer: Any) -> Fingerprint:
    """Read a checkpoint only to check and to identify it, as :func:`load_backbone` does."""
    if transformers_backbone(model) is not None:
        return fingerprint_files(weight_files(checkpoint_directory(checkpointer)))
    return read_weights(model, checkpointer, lambda name, weight: None)


def read_weights(
    model: TransformerDecoder, checkpointer: Any, use: Callable[[str, torch.Tensor], None]
) -> Fingerprint:
    """Read a checkpoint one weight after the other; return :func:`load_backbone`'s fingerprint.

    ``use`` gets each weight's name and the weight, which may be a view of a memory-mapped file.
    """
    expected = _backbone_shapes(model)
    is_tied = isinstance(model.output, TiedLinear)
    digests, taken = WeightDigests(), set()
    pair: dict[str, torch.Tensor] = {}  # the embedding and its tied head: views, not read yet

    def take(name: str, weight: torch.Tensor) -> None:
        _check_weight(name, weight, expected[name])
        taken.add(name)
        digests.add(name, weight)
        use(name, weight)

    for weights in _checkpoint_files(checkpointer):
        while weights:
            name, weight = weights.popitem()
            if is_tied and name in (EMBEDDING, HEAD):
                pair[name] = weight
            elif name in expected:
                take(name, weight)
            else:
                raise UserError(f"the checkpoint has a weight that the model lacks: {name}; {_FIX}")
    if pair:
        take(EMBEDDING, _one_of(pair))
    missing = expected.keys() - taken
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the model's {len(expected)} weights, "
            f"for example {min(missing)}; {_FIX}"
        )
    return digests.fingerprint()


def _one_of(pair: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight of embedding and tied head, of which a file may have either, or both."""
    first, *rest = pair.values()
    if any(not torch.equal(first, weight) for weight in rest):
        raise UserError(
            "config.json says that the LM head is the embedding (tie_word_embeddings), but the "
            "checkpoint has an lm_head.weight that differs from it: set tie_word_embeddings to "
            "false there if the head is meant, or take it out of the file"
        )
    return first


EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
_FIX = "the config's model block must describe, or name the directory of, this very checkpoint"


def _checkpoint_files(checkpointer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """State dicts under torchtune's names, one file of the checkpoint at a time where possible."""
    paths = checkpoint_paths(checkpointer)
    if not isinstance(checkpointer, training.FullModelHFCheckpointer) or paths is None:
        yield _load_weights(checkpointer, "the checkpoint")
        return
    try:
        for path in paths:
            # torchtune's conversion works on any subset of the weights; this list decides which.
            take_paths(checkpointer, [path])
            yield _load_weights(checkpointer, str(path))
    finally:
        take_paths(checkpointer, paths)


def _load_weights(checkpointer: Any, name: str) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = checkpointer.load_checkpoint()[training.MODEL_KEY]
    except UserError:
        raise
    except Exception as error:  # torchtune's conversion raises a bare Exception
        cause = error.__cause__
        # A reader's error says what is wrong, the KeyError of a conversion does not.
        reason = error if cause is None or isinstance(cause, KeyError) else cause
        raise UserError(
            f"{name} is damaged or of another model type than the checkpointer's: "
            f"{' '.join(str(reason).split())}"
        ) from error
    return weights


def _backbone_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a checkpoint must have, however they are stored."""
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Repair):  # no checkpoint has it
            continue
        own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        if isinstance(module, QuantizedLinear):
            own = {name: shape for name, shape in own.items() if name == "bias"}
            own["weight"] = (module.out_features, module.in_features)
        shapes.update((f"{prefix}.{name}", shape) for name, shape in own.items())
    return {name: s for name, s in shapes.items() if not is_side(name)}


def _check_weight(name: str, weight: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(weight.shape) != wanted:
        raise UserError(
            f"{name} has shape {tuple(weight.shape)} in the checkpoint and {wanted} in the model; "
            f"{_FIX}"
        )
    if not weight.is_floating_point():
        raise UserError(
            f"the backbone's weight {name} is {weight.dtype}, where floating-point numbers are "
            "expected: name a directory that is not quantised, or use *_from_hf"
        )


def set_weight(
    model: nn.Module, name: str, weight: torch.Tensor, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Give a model one weight of its checkpoint, quantised if the model has it quantised.

    The weight is copied to ``device``; meta takes it away again.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    before = getattr(owner, leaf, None)
    if isinstance(before, QuantizedTable):
        table = quantize_table(weight, dtype=dtype, device=device)
        setattr(owner, leaf, nn.Parameter(table, requires_grad=False))
        return
    # torchtune's RMSNorm computes in fp32: with an fp32 weight torch takes its fused kernel.
    # Integers are rounded from the checkpoint's own precision.
    is_integer = isinstance(owner, PEQALinear) and leaf == "weight"
    own_dtype = torch.float32 if is_integer or isinstance(owner, RMSNorm) else dtype
    # A copy, also where nothing changes: the source is a view of the memory-mapped file.
    dense = weight.to(device=device, dtype=own_dtype, copy=True)
    if isinstance(owner, QuantizedLinear) and leaf == "weight":
        owner.quantize_(dense)
    else:
        setattr(owner, leaf, nn.Parameter(dense, requires_grad=False))


def check_architecture(model: Any, checkpoint_dir: Path) -> None:
    """Refuse a model that is not the one of the checkpoint's ``config.json``.

    A wrong number of layers would fail at loading, but a wrong rotary base or number of heads would
    not: the shapes agree and the logits are silently wrong. UserError names every property that
    differs. Without a ``config.json`` a decoder of torchtune is not checked. The model may be on
    meta.
    """
    if isinstance(model, TransformersModel):
        check_same(model.backbone, checkpoint_dir)
        return
    config = read_json(checkpoint_dir / "config.json", optional=True)
    differences = [
        f"{name} is {stored} in the checkpoint and {built} in the model"
        for name, (stored, built) in _properties(config, model).items()
        if stored is not None and built is not None and stored != built
    ]
    if differences and config:
        raise UserError(
            f"the config's model block does not fit {checkpoint_dir}: {'; '.join(differences)}"
        )


def _properties(config: dict[str, Any], model: TransformerDecoder) -> dict[str, tuple[Any, Any]]:
    """What a checkpoint's ``config.json`` and a model say, by torchtune's names."""
    attention, mlp = model.layers[0].attn, model.layers[0].mlp
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps the base
    scaling = config.get("rope_scaling") or rope
    is_scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    base = getattr(attention.pos_embeddings, "base", None)
    factor = getattr(attention.pos_embeddings, "scale_factor", None)
    return {
        "vocab_size": (config.get("vocab_size"), model.tok_embeddings.num_embeddings),
        "num_layers": (config.get("num_hidden_layers"), len(model.layers)),
        "embed_dim": (config.get("hidden_size"), attention.embed_dim),
        "num_heads": (config.get("num_attention_heads"), attention.num_heads),
        "num_kv_heads": (config.get("num_key_value_heads"), attention.num_kv_heads),
        "intermediate_dim": (config.get("intermediate_size"), mlp.w1.out_features),
        "rope_base": (_number(config.get("rope_theta") or rope.get("rope_theta")), _number(base)),
        "rope scale_factor": (_number(scaling.get("factor") if is_scaled else 1), _number(factor)),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
