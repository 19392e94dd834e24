"""Compare a model with the ``config.json`` of the checkpoint that it will be filled from.

A wrong number of layers fails at loading, but a wrong rotary base or number of heads does not: the
shapes agree and the logits are silently wrong.
"""

from pathlib import Path
from typing import Any

from torchtune.modules import TransformerDecoder

from qst_tune.backbone.loading import check_same
from qst_tune.backbone.transformers_model import TransformersModel
from qst_tune.errors import UserError
from qst_tune.json_files import read_json


def check_architecture(model: Any, checkpoint_dir: Path) -> None:
    """Refuse a model that is not the checkpoint's, naming every property that differs.

    Without a ``config.json`` a decoder of torchtune's is not checked. The model may be on meta.
    """
    if isinstance(model, TransformersModel):
        check_same(model.backbone, checkpoint_dir)
        return
    config = read_json(checkpoint_dir / "config.json", optional=True)
    if not config:
        return
    stored = _stored_properties(config)
    built = _built_properties(model)
    differences = [
        f"{name} is {stored[name]} in the checkpoint and {built[name]} in the model"
        for name in built
        if stored.get(name) is not None and built[name] is not None and stored[name] != built[name]
    ]
    if differences:
        raise UserError(
            f"the config's model block does not fit {checkpoint_dir}: {'; '.join(differences)}"
        )


def _stored_properties(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps the base
    scaling = config.get("rope_scaling") or rope
    is_scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    return {
        "vocab_size": config.get("vocab_size"),
        "num_layers": config.get("num_hidden_layers"),
        "embed_dim": config.get("hidden_size"),
        "num_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads"),
        "intermediate_dim": config.get("intermediate_size"),
        "rope_base": _as_number(config.get("rope_theta") or rope.get("rope_theta")),
        "rope scale_factor": _as_number(scaling.get("factor")) if is_scaled else 1.0,
    }


def _built_properties(model: TransformerDecoder) -> dict[str, Any]:
    layer = model.layers[0]
    rope = layer.attn.pos_embeddings
    return {
        "vocab_size": model.tok_embeddings.num_embeddings,
        "num_layers": len(model.layers),
        "embed_dim": layer.attn.embed_dim,
        "num_heads": layer.attn.num_heads,
        "num_kv_heads": layer.attn.num_kv_heads,
        "intermediate_dim": layer.mlp.w1.out_features,
        "rope_base": _as_number(getattr(rope, "base", None)),
        "rope scale_factor": _as_number(getattr(rope, "scale_factor", None)),
    }


def _as_number(value: Any) -> float | None:
    return None if value is None else float(value)
