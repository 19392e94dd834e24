"""Models for a local Hugging Face folder, whatever supported family it is of."""

from pathlib import Path

from torchtune.modules import TransformerDecoder

from qst_tune.errors import UserError
from qst_tune.models.hf.families import Architecture, read_architecture
from qst_tune.models.peqa import peqa_builder
from qst_tune.models.qst import qst_builder


def backbone_from_hf(checkpoint_dir: str, max_seq_len: int | None = None) -> TransformerDecoder:
    """Build the decoder that a Hugging Face folder's ``config.json`` describes.

    Only that file is read. The weights come through
    :class:`~qst_tune.training.hf_checkpointer.HFCheckpointer`, which converts them for the decoder
    built here. docs/models.md lists the families, and what is refused.

    Args:
        checkpoint_dir (str): the folder.
        max_seq_len (int | None): positions; None: as many as the decoder computes exactly as the
            model does, the least of its ``max_position_embeddings``, its sliding window, and the
            original length of a LongRoPE. A large number takes memory for rotary embeddings.

    Returns:
        TransformerDecoder: with random weights, or on meta.

    Raises:
        UserError: if the folder is no such model, a setting of it is not supported, or
            ``max_seq_len`` is longer than can be exact.
    """
    folder = Path(checkpoint_dir)
    architecture = read_architecture(folder)
    return architecture.build(_length(architecture, max_seq_len, folder))


def _length(architecture: Architecture, wanted: int | None, folder: Path) -> int:
    name = min(architecture.limits, key=lambda limit: architecture.limits[limit])
    longest = architecture.limits[name]
    if wanted is not None and wanted > longest:
        raise UserError(
            f"max_seq_len={wanted} is longer than {name}={longest} in {folder / 'config.json'}: "
            "lower it"
        )
    return wanted or longest


qst_from_hf = qst_builder(backbone_from_hf)
peqa_from_hf = peqa_builder(backbone_from_hf)
