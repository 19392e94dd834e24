"""Models for a local Hugging Face directory, whatever model type it is of."""

from pathlib import Path
from typing import Literal, get_args

from qst_tune.backbone.loading import backbone_on_meta, directory_format
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.models.hf.families import Architecture, read_architecture, takes_torchtune
from qst_tune.models.peqa import peqa_builder
from qst_tune.models.qst import Decoder, qst_builder

BackboneKind = Literal["auto", "torchtune", "transformers"]


def backbone_from_hf(
    checkpoint_dir: str, max_seq_len: int | None = None, backbone: BackboneKind = "auto"
) -> Decoder:
    """Build the decoder that a Hugging Face directory's ``config.json`` describes.

    Only that file is read. docs/models.md lists the model types, and what is refused.

    Args:
        checkpoint_dir (str): the directory.
        max_seq_len (int | None): positions; None: as many as the decoder computes exactly as the
            model does. With torchtune's modules that is the least of ``max_position_embeddings``,
            its sliding window, and the original length of a LongRoPE, and a large number takes
            memory for rotary embeddings.
        backbone (BackboneKind): "torchtune" rebuilds the model from torchtune's modules, which a
            few families have; "transformers" takes transformers' own model; "auto": torchtune where
            it has the family.

    Returns:
        Decoder: with random weights, or on meta; over transformers always on meta.

    Raises:
        UserError: if the directory has no such model, a setting of it is not supported, or
            ``max_seq_len`` is longer than can be exact.
    """
    folder = Path(checkpoint_dir)
    if backbone not in get_args(BackboneKind):
        known = ", ".join(get_args(BackboneKind))
        raise UserError(f"model.backbone={backbone!r} is unknown; choose one of {known}")
    is_quantised = directory_format(folder) is not None
    torchtune_has_it = takes_torchtune(folder) and not is_quantised
    if backbone == "transformers" or (backbone == "auto" and not torchtune_has_it):
        return backbone_on_meta(folder, max_seq_len)
    if is_quantised:
        raise UserError(
            f"model.backbone=torchtune: {folder} is quantised already, which torchtune's modules "
            "do not take over for QST: set model.backbone=auto"
        )
    architecture = read_architecture(folder)
    return architecture.build(_length(architecture, max_seq_len, folder))


def transformers_from_hf(
    checkpoint_dir: str, max_seq_len: int | None = None
) -> TransformersBackbone:
    """Build a directory's decoder as transformers' own model, on meta, for a classifier.

    Args:
        checkpoint_dir (str): the directory.
        max_seq_len (int | None): positions; None: the model's.

    Returns:
        TransformersBackbone: not quantised.
    """
    return backbone_on_meta(Path(checkpoint_dir), max_seq_len)


def _length(architecture: Architecture, wanted: int | None, folder: Path) -> int:
    name = min(architecture.limits, key=lambda limit: architecture.limits[limit])
    longest = architecture.limits[name]
    if wanted is not None and wanted > longest:
        raise UserError(
            f"max_seq_len={wanted} is longer than {name}={longest} in {folder / 'config.json'}: "
            "lower it"
        )
    return wanted or longest


def _transformers_from_hf(checkpoint_dir: str, max_seq_len: int | None = None) -> Decoder:
    """Transformers' own model of a directory."""
    return backbone_on_meta(Path(checkpoint_dir), max_seq_len)


_transformers_from_hf.__name__ = backbone_from_hf.__name__  # the builder's name is made of it

qst_from_hf = qst_builder(backbone_from_hf)
peqa_from_hf = peqa_builder(_transformers_from_hf)
