"""A QST model that classifies a sequence instead of continuing it."""

from functools import cache
from typing import Any

import torch
from torchtune.generation import (
    get_causal_mask_from_padding_mask,
    get_position_ids_from_padding_mask,
)

from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import ZeroLinear


class QSTClassifier(QSTModel):
    r"""Quantized Side Tuning with a trained head on the last token in place of the LM head.

    .. math:: z = W_{score}\,y_\ell

    where :math:`y_\ell` is the mixed state of the last real token and :math:`W_{score}`, ``[C, D]``
    without bias, is trained in fp32 from zero. With ``num_labels`` C = 1 it is a regression. The
    head is part of the side network (``side.score``). The LM head stays in the model, unused, so
    that the checkpoint loads as a whole. The given model, over any backbone, becomes the
    classifier.

    Source: the authors' sequence classification (github.com/YouAreSpecialToMe/QST at 27cef0a).
    Differs from it: theirs starts at random values. Their OPT code reads index n - 1 of a row with
    n real tokens (``counts_tokens``), which under padding on the left is not the last one.
    """

    num_labels: int
    counts_tokens: bool

    def __new__(cls, model: QSTModel, num_labels: int, **_: Any) -> "QSTClassifier":
        """Make the model itself a classifier: its parameters keep their names."""
        made: Any = model
        made.__class__ = _class_over(made.__class__)
        classifier: QSTClassifier = made
        return classifier

    def __init__(self, model: QSTModel, num_labels: int, *, counts_tokens: bool = False) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels} must be at least 1 (1: a regression)")
        # No super().__init__(): this is the model, which was initialised.
        self.num_labels = num_labels
        self.counts_tokens = counts_tokens
        self.skip_output_layer = True
        trained = next(self.side.parameters())
        self.side.score = ZeroLinear(
            self.backbone.width, num_labels, bias=False, device=trained.device, dtype=trained.dtype
        )

    # One answer a row takes no mask or positions: they follow from the padding.
    def forward(
        self, tokens: torch.Tensor, *, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Classify sequences ``[B, T]``: fp32 logits ``[B, C]``.

        ``padding_mask``, ``[B, T]``, is True for real tokens, which are contiguous; None: all are.
        """
        last = torch.full(tokens.shape[:1], tokens.shape[1] - 1, device=tokens.device)
        where = {}
        if padding_mask is not None:
            index = torch.arange(tokens.shape[1], device=tokens.device)
            last = (index * padding_mask).argmax(-1)
            if self.counts_tokens:
                last = padding_mask.sum(-1) - 1
            # Causal attention alone keeps padding on the right from every real token.
            is_causal = bool(padding_mask[:, 0].all())
            if not is_causal and self.takes_padding:
                where["mask"] = padding_mask.bool()
            elif not is_causal:
                where["mask"] = get_causal_mask_from_padding_mask(padding_mask)
                where["input_pos"] = get_position_ids_from_padding_mask(padding_mask)
        y_BTD: Any = super().forward(tokens, **where)  # one tensor: the head is skipped
        y_BD = y_BTD[torch.arange(len(tokens), device=tokens.device), last]
        score: Any = self.side.score
        logits: torch.Tensor = score(y_BD.to(score.weight.dtype)).float()
        return logits


@cache
def _class_over(kind: type[QSTModel]) -> Any:
    return type(f"{kind.__name__}Classifier", (QSTClassifier, kind), {})
