"""A repaired linear layer: a frozen product of low rank beside a rounded weight."""

import torch
import torch.nn.functional as F
from torch import nn


class Repair(nn.Module):
    r"""What is added to the output of a quantised linear layer.

    .. math:: \Delta y = (x R^\top) L^\top, \qquad L R \approx W - Q(W)

    ``left`` L is ``[O, r]``, ``right`` R ``[r, I]``; both are frozen, and computed from the
    weights alone while they load (:class:`~qst_tune.backbone.repair.Repairs`). ``name`` becomes
    part of the backbone's identity. A gradient flows to x, for which nothing is saved.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, name: str) -> None:
        super().__init__()
        self.name = name
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)

    @property
    def rank(self) -> int:
        """Rows of R."""
        return len(self.right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        return F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Add the product to a decoded weight, ``[O, I]``, in fp32; keep its dtype."""
        return torch.addmm(weight.float(), self.left.float(), self.right.float()).to(weight.dtype)
