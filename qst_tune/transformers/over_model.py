"""A side network over a model of transformers that is in memory."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torchtune import utils
from transformers import PreTrainedModel

from qst_tune.backbone.directory import read_weights_file, weight_files
from qst_tune.backbone.hub import fetch_model, hub_name, is_hub_name, model_name
from qst_tune.backbone.identity import (
    BackboneId,
    Fingerprint,
    WeightDigests,
)
from qst_tune.backbone.loading import backbone_on_meta, check_head, directory_format
from qst_tune.backbone.text_model import score_of
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.config.file import PlainConfig
from qst_tune.errors import UserError
from qst_tune.models.qst import qst_decoder
from qst_tune.modules.backbone_formats import BaseQuantization
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.side.config import SideConfig
from qst_tune.results.description import SIDE_NETWORK, read_description
from qst_tune.results.tuned_directory import Provenance, load_tuned

_BUILDER: dict[str, Any] = {"_component_": "qst_tune.models.qst_from_hf"}
_CLASSIFIER = {
    "_component_": "qst_tune.models.qst_classifier",
    "backbone": "qst_tune.models.backbone_from_hf",
}

log = utils.get_logger("INFO")


def side_over(
    model: PreTrainedModel, config: SideConfig, quantize: BaseQuantization = "none"
) -> tuple[QSTTransformer, Provenance]:
    """Put a new side network over a loaded model, which is frozen, and quantised in place if asked.

    Also returns what a saved directory says of it. A model that is not supported is a UserError.
    """
    method = getattr(model.config, "quantization_config", None)
    _check(model, method, quantize)
    home = _directory(model)
    found = None if home is None else _fingerprint_there(model, home)
    if home is not None and found is None:
        log.warning(f"the model's weights are not those of {home}: it is identified by its own")
        home = None
    full, sampled = found or _own_fingerprint(model)
    backbone = TransformersBackbone(model, str(home or ""))
    decoder: Any = qst_decoder(backbone, base_quantization=quantize, **config.settings())
    builder = _BUILDER
    score = score_of(model)
    if score is None:
        check_head(backbone)
    else:
        builder = {**_CLASSIFIER, "num_labels": score.out_features}
        decoder = _classifier(decoder, score)
    stored, quantization = str(quantize), backbone.quantization
    if method is not None:
        stored, quantization = _foreign(method, home)
    place = (hub_name(home) or str(home.resolve())) if home else _name(model)
    name, revision = model_name(home) if home else (place or str(model.config.model_type), "")
    identity = BackboneId(name, full, quantization, revision, "transformers", sampled)
    where = {"checkpoint_dir": place, "base_quantization": stored}
    block = {**builder, **where, **config.settings()}
    provenance = Provenance(identity, block, _recipe_config(block), backbone_path=place)
    return decoder, provenance


def load_over(directory: Path, model: PreTrainedModel) -> tuple[QSTTransformer, Provenance]:
    """Put a saved side network over the model that it was trained on; any other is a UserError."""
    block = read_description(directory, SIDE_NETWORK).model
    builder = _BUILDER if score_of(model) is None else _CLASSIFIER
    if any(block.get(name) != value for name, value in builder.items()):
        raise UserError(
            f"{directory} was not trained over a {type(model).__name__} of transformers: name the "
            "directory of its backbone, not a model"
        )
    stored = block.get("base_quantization") or "auto"
    is_dense = getattr(model.config, "quantization_config", None) is None
    quantize: Any = stored if is_dense and stored != "auto" else "none"
    decoder, provenance = side_over(model, SideConfig.of_block(block), quantize)
    load_tuned(directory, decoder.side, backbone=provenance.backbone)
    return decoder, provenance


def _classifier(decoder: QSTTransformer, score: object) -> QSTClassifier:
    """The model's own head continues to train, in fp32, as a part of the side network."""
    if getattr(score, "bias", None) is not None or not isinstance(score, nn.Linear):
        raise UserError(f"a head like {score} is not supported: it must be linear, without bias")
    model = QSTClassifier(decoder, score.out_features)
    with torch.no_grad():
        model.side.get_parameter("score.weight").copy_(score.weight)
    return model


def _check(model: PreTrainedModel, method: object, quantize: BaseQuantization) -> None:
    devices = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(devices) > 1:
        raise UserError(f"the model is on {', '.join(sorted(devices))}: load it onto one device")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("the model has no weights: load it before the side network is added")
    if method is not None and quantize != "none":
        raise UserError(
            f"quantize={quantize!r}: the model is quantised already ({_method(method)}); leave "
            "quantize out"
        )


def _directory(model: PreTrainedModel) -> Path | None:
    """Where the model was loaded from, if that is still here."""
    name = _name(model)
    try:
        if is_hub_name(name):
            commit = getattr(model.config, "_commit_hash", None)
            return fetch_model(f"{name}@{commit}" if commit else name, local_files_only=True)
        return Path(name) if name and weight_files(Path(name)) else None
    except UserError:
        return None


def _own_fingerprint(model: PreTrainedModel) -> Fingerprint:
    digests = WeightDigests()
    for name, weight in model.named_parameters():
        digests.add(name, weight)
    return digests.fingerprint()


def _fingerprint_there(model: PreTrainedModel, home: Path) -> Fingerprint | None:
    """Identify the files of a directory; None if they differ from the model.

    Each dense weight that has the same name is compared. A merged adapter, a resized embedding or a
    tuned layer makes it another model.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    digests = WeightDigests()
    for name, stored in (item for p in weight_files(home) for item in read_weights_file(p).items()):
        digests.add(name, stored)
        mine = own.get(name)
        if mine is None or mine.dtype != model.dtype or not mine.is_floating_point():
            continue
        if mine.shape != stored.shape or not torch.equal(stored.to(mine.device, mine.dtype), mine):
            return None
    return digests.fingerprint()


def _foreign(method: Any, home: Path | None) -> tuple[str, str]:
    """How recipes must store a model that another program has quantised, and what that is called.

    Codes of a directory are taken over. What was rounded while it was loaded is rounded again, by
    our own NF4 or FP4, or cannot be made here.
    """
    if home is not None and directory_format(home) is not None:
        twin = backbone_on_meta(home)
        twin.quantize("auto", "none")
        return "auto", twin.quantization
    if getattr(method, "load_in_4bit", False):
        form = str(method.bnb_4bit_quant_type)
        log.warning(
            f"bitsandbytes rounded the model to {form} on loading; a saved side network is loaded "
            f"over qst_tune's own {form}, whose scales differ a little, unless "
            "from_pretrained(DIR, backbone=MODEL) names this model"
        )
        return form, form
    return "none", f"{_method(method)} on loading"


def _method(method: Any) -> str:
    found = method.get("quant_method") if isinstance(method, dict) else method.quant_method
    return str(getattr(found, "value", found))


def _name(model: PreTrainedModel) -> str:
    return str(model.name_or_path or "")


def _recipe_config(block: PlainConfig) -> str:
    """What recipes need to load the directory."""
    place = block["checkpoint_dir"]
    config = {
        "model": block,
        "tokenizer": {"_component_": "qst_tune.data.hf_chat_tokenizer", "path": place},
        "checkpointer": {
            "_component_": "qst_tune.training.HFCheckpointer",
            "checkpoint_dir": place,
        },
    }
    return yaml.safe_dump(config, sort_keys=False)
