"""Models for a Hugging Face directory, whatever model type it is of."""

from pathlib import Path

from qst_tune.backbone.loading import backbone_on_meta
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.models.peqa import peqa_builder
from qst_tune.models.qst import qst_builder


def backbone_from_hf(checkpoint_dir: str, max_seq_len: int | None = None) -> TransformersBackbone:
    """Build the decoder of a Hugging Face directory's ``config.json``, on the meta device.

    It is transformers' own model; docs/models.md lists what was tested. ``max_seq_len`` None is the
    model's number of positions. UserError if there is no such decoder, or it has fewer positions.
    """
    return backbone_on_meta(Path(checkpoint_dir), max_seq_len)


qst_from_hf = qst_builder(backbone_from_hf)
peqa_from_hf = peqa_builder(backbone_from_hf)
