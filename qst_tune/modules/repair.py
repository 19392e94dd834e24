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

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add to ``y`` ``[..., O]`` what it lacks of the product with ``x`` ``[..., I]``.

        Without gradient it is added in place: the pass over a frozen backbone takes no memory more
        than ``[..., r]``, and one addition less.
        """
        h_Nr = F.linear(x, self.right.to(x.dtype)).view(-1, self.rank).to(y.dtype)
        y_NO, left = y.view(-1, y.shape[-1]), self.left.to(y.dtype)
        if torch.is_grad_enabled():
            return torch.addmm(y_NO, h_Nr, left.T).view_as(y)
        torch.addmm(y_NO, h_Nr, left.T, out=y_NO)
        return y

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Add the product to a decoded weight, ``[O, I]``, in fp32; keep its dtype."""
        return torch.addmm(weight.float(), self.left.float(), self.right.float()).to(weight.dtype)
