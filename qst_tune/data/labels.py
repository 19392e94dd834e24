"""Labels in the place of the token that predicts them.

Datasets label each token with itself. Batches hold at position t the label that the model must
predict there, the token of t + 1 in the same row, so that no loss has to know where rows end.
Notation: B batch, T tokens.
"""

import torch
import torch.nn.functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX


def align_labels(
    labels: torch.Tensor,
    *,
    ignore_index: int = CROSS_ENTROPY_IGNORE_IDX,
    input_pos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move each label ``[B, T]`` to the position that predicts it.

    Nothing follows the last position of a row, nor, where one row holds several samples, a position
    after which ``input_pos`` ``[B, T]`` is not the following number: its label is ``ignore_index``.
    """
    aligned = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if input_pos is None:
        return aligned
    ends = F.pad(input_pos[..., 1:] != input_pos[..., :-1] + 1, (0, 1), value=True)
    return aligned.masked_fill(ends, ignore_index)
