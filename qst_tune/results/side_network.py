"""A side network on disk: the directory of ``tuned_directory``, with the tensors of ``model.side``.

==============================  ===================================================================
``side_network.safetensors``    the tensors, under the names of ``model.side``: fp32 if trained
                                here, else as they were imported
``qst_config.json``             method, format, model block, structure, the backbone's name and
                                fingerprint
``config.json``                 for transformers (``qst_tune.transformers``): the
                                type of model, and where the backbone is
``recipe_config.yaml``          the config of the run that made it
``README.md``                   a model card
==============================  ===================================================================
"""

import json
from pathlib import Path
from typing import Any

import torch

from qst_tune import __version__
from qst_tune.atomic_files import write_directory
from qst_tune.backbone.identity import BackboneId
from qst_tune.modules.side.network import SideNetwork
from qst_tune.results.side_structure import check_structure, side_structure
from qst_tune.results.tuned_directory import (
    Provenance,
    TunedFormat,
    load_tuned,
    read_description,
    tuned_files,
)

TRANSFORMERS_MODEL_TYPE = "qst"

SIDE_NETWORK = TunedFormat(
    method="qst",
    title="QST side network",
    weights_file="side_network.safetensors",
    config_file="qst_config.json",
    origin="qst_finetune wrote (<output_dir>/side_network)",
)


def side_network_files(side: SideNetwork, provenance: Provenance) -> dict[str, bytes]:
    """Return the directory's files by name."""
    backbone = provenance.backbone
    about = f"""\
Made with qst_tune {__version__} by Quantized Side Tuning
(https://arxiv.org/abs/2401.07159). It is not a model by itself and cannot be merged into one: it
runs beside {backbone.name} ({backbone.quantization}), whose weights have the fingerprint
`{backbone.fingerprint[:16]}...`, and is loaded with
`tune run {_usage(provenance.model_block)}`."""
    # A wrapped module (recomputation, compile) adds prefixes to named_parameters, not to these.
    files = tuned_files(
        SIDE_NETWORK, side.state_dict(), provenance, about=about, structure=side_structure(side)
    )
    num_labels = provenance.model_block.get("num_labels")
    home = provenance.backbone_path or backbone.name
    return {**files, "config.json": transformers_config(home, num_labels)}


def transformers_config(backbone: str, num_labels: int | None = None) -> bytes:
    """Write the ``config.json`` for transformers; only a classifier has ``num_labels``.

    ``backbone`` is the backbone's directory, or its name on the hub.
    """
    kind = "QSTForCausalLM" if num_labels is None else "QSTForSequenceClassification"
    config: dict[str, Any] = {
        "model_type": TRANSFORMERS_MODEL_TYPE,
        "architectures": [kind],
        "backbone": backbone,
    }
    if num_labels is not None:
        config["id2label"] = {str(label): f"LABEL_{label}" for label in range(num_labels)}
    return (json.dumps(config, indent=2) + "\n").encode()


def _usage(model_block: dict[str, Any]) -> str:
    where = "--config <config> side_network=<this directory>"
    if "num_labels" in model_block:  # a classifier
        return f"qst_classify {where} rows=<rows.jsonl>"
    return f'qst_generate {where} prompt="..."'


def save_side_network(directory: Path, side: SideNetwork, **provenance: Any) -> None:
    """Write the directory, whole or not at all; ``provenance`` are fields of ``Provenance``.

    UserError if it cannot be written; the one that was there is untouched.
    """
    write_directory(directory, side_network_files(side, Provenance(**provenance)))


def load_side_network(directory: Path, side: SideNetwork, *, backbone: BackboneId) -> None:
    """Load a directory into a side network, after checking that it belongs to this backbone.

    UserError as :func:`load_tuned`, or if the tensors are those of another structure.
    """
    side.load_state_dict(read_side_network(directory, side, backbone=backbone))


def read_side_network(
    directory: Path, side: SideNetwork, *, backbone: BackboneId
) -> dict[str, torch.Tensor]:
    """Read a directory's tensors, after the checks of :func:`load_side_network`."""
    tensors = load_tuned(SIDE_NETWORK, directory, side.state_dict(), backbone=backbone)
    check_structure(directory, read_description(directory, SIDE_NETWORK), side)
    return tensors


def read_provenance(directory: Path, backbone_path: str) -> Provenance:
    """Read how a side network came to be, without its figures, which further training makes old.

    ``backbone_path`` is where its backbone is now, or its name on the hub.
    """
    description = read_description(directory, SIDE_NETWORK)
    return Provenance(
        BackboneId(**description["backbone"]),
        description["model"],
        (directory / "recipe_config.yaml").read_text(encoding="utf-8"),
        lineage=description.get("lineage") or (),
        backbone_path=backbone_path,
    )
