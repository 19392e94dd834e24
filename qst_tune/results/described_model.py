"""Build a model from the description in a result's directory, without running foreign code.

The directory may come from anyone. Of what it names, only builders of ``qst_tune.models`` and the
checkpointers listed here are called; both only read tensors and numbers.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import qst_tune.models
from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.models.build import build_any_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.results.side_network import SIDE_NETWORK, load_side_network
from qst_tune.results.start import FORMATS
from qst_tune.results.tuned_directory import TunedFormat, read_description

_HF_CHECKPOINTER = "qst_tune.training.HFCheckpointer"
_HF_CHECKPOINTER_UNTIL_0_1 = "qst_tune.training.hf_checkpointer.HFCheckpointer"
# With the settings that are kept; all paths are replaced.
_CHECKPOINTERS: dict[str, tuple[str, ...]] = {
    "torchtune.training.FullModelHFCheckpointer": (
        "checkpoint_files",
        "model_type",
        "safe_serialization",
    ),
    _HF_CHECKPOINTER: (),
}


def directory_format(directory: Path) -> TunedFormat:
    """Find out which method wrote a directory; UserError if none did."""
    for form in FORMATS.values():
        if (directory / form.config_file).is_file():
            return form
    raise UserError(
        f"{directory} is no result of qst_tune: it has neither "
        f"{' nor '.join(form.config_file for form in FORMATS.values())}"
    )


def build_described(
    directory: Path,
    dtype: torch.dtype,
    backbone_directory: Path | None = None,
    *,
    classifies: bool = False,
) -> QSTModel:
    """Build a side network's model on meta; the backbone has ``dtype``.

    ``backbone_directory`` is the backbone's directory now, for a builder that reads it; None: where
    it was. UserError if the model is not one of ``qst_tune.models``, or if ``classifies``
    does not match: whether it must be a classifier, or a model that writes text.
    """
    model = build_any_described(directory, SIDE_NETWORK, dtype, backbone_directory)
    if isinstance(model, QSTClassifier) and not classifies:
        raise UserError(
            f"{directory} is a classifier, which writes no text: use qst_classify, or "
            "QSTForSequenceClassification in Python"
        )
    if not isinstance(model, QSTClassifier if classifies else QSTModel):
        raise UserError(f"{directory} is no {'classifier' if classifies else 'side network'}")
    return model


def build_any_described(
    directory: Path, form: TunedFormat, dtype: torch.dtype, backbone_directory: Path | None = None
) -> Any:
    """Build the model of a result on meta, of either format; see :func:`build_described`."""
    block = read_description(directory, form).get("model") or {}
    # A classifier names two builders: its own and its backbone's.
    names = [str(block.get("_component_", "")), str(block.get("backbone", ""))]
    for name in names if "." in names[1] else names[:1]:
        if not _is_known(name):
            raise UserError(
                f"{directory} names the model {name!r}; from a directory, which may be anyone's, "
                "only builders that qst_tune.models has are called: use a config with that model "
                "block, or if it is a qst_opt_*, which are gone, tune again with qst_from_hf"
            )
    if names[0].endswith("_from_hf"):
        block.pop("backbone", None)  # until 0.1 a choice; BackboneId knows what it was
    if backbone_directory is not None and "checkpoint_dir" in block:  # of a builder *_from_hf
        block = {**block, "checkpoint_dir": str(backbone_directory)}
    return build_any_on_meta(OmegaConf.create({"model": block}), dtype)


def _is_known(name: str) -> bool:
    """Whether it is a public builder of ours, or of a family of torchtune."""
    home, _, leaf = name.rpartition(".")
    is_ours = home == "qst_tune.models" and leaf in qst_tune.models.__all__
    if is_ours or not re.fullmatch(r"torchtune\.models\.\w+", home):
        return is_ours
    try:
        return leaf in import_module(home).__all__
    except (ImportError, AttributeError):
        return False


def load_described(
    directory: Path,
    backbone_directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    classifies: bool = False,
) -> tuple[QSTModel, BackboneId]:
    """Load a side network and its backbone in evaluation mode, by the result's directory alone.

    Also returns what the backbone was loaded from. UserError if one of the directories is not what
    it should be, or they do not belong together.
    """
    model = build_described(directory, dtype, backbone_directory, classifies=classifies)
    with checkpointer_of(directory, backbone_directory) as cfg:
        backbone = load_frozen_backbone(model, cfg, dtype=dtype, device=device)
    model.side.materialize(device)
    load_side_network(directory, model.side, backbone=backbone)
    model.eval()
    return model, backbone


@contextmanager
def checkpointer_of(directory: Path, backbone_directory: Path) -> Iterator[DictConfig]:
    """Give a config with the run's ``checkpointer`` block, for a backbone that may have moved.

    It is valid for as long as the context lasts. UserError if the run's config cannot be read, or
    names an unknown checkpointer.
    """
    path = directory / "recipe_config.yaml"
    try:
        block = dict(OmegaConf.load(path).checkpointer)
    except Exception as error:  # OmegaConf and YAML raise many types
        reason = " ".join(str(error).split())
        raise UserError(f"{path} has no valid checkpointer block: {reason}") from error
    if block.get("_component_") == _HF_CHECKPOINTER_UNTIL_0_1:
        block["_component_"] = _HF_CHECKPOINTER
    if block.get("_component_") not in _CHECKPOINTERS:
        known = " or ".join(_CHECKPOINTERS)
        raise UserError(f"{path} names the checkpointer {block.get('_component_')!r}, not {known}")
    kept = ("_component_", *_CHECKPOINTERS[block["_component_"]])
    found = {name: block[name] for name in kept if name in block}
    found["checkpoint_dir"] = str(backbone_directory)
    with tempfile.TemporaryDirectory() as unused:
        if found["_component_"] != _HF_CHECKPOINTER:  # torchtune's make a directory of their own
            found["output_dir"] = unused
        yield OmegaConf.create({"checkpointer": found})
