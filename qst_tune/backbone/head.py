"""The LM head of a transformers model, with what its ``forward`` does to the logits."""

from typing import Any

import torch
from torch import nn

from qst_tune.backbone.opt_side_blocks import ProjectedHead
from qst_tune.backbone.text_model import score_of

# What some models multiply their logits (or the head's input, which is the same) with, by the name
# of the setting: Cohere, Falcon-H1, Granite, MiniCPM 3, Inkling. HyperCLOVA X multiplies where
# Granite divides. ``check_head`` compares the result with the model's own logits.
_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
_OTHER_SIGN = {"hyperclovax": {"logits_scaling": 1}}


class ScaledHead(nn.Module):
    r"""Logits with a scale s and a soft cap c behind the matrix product.

    .. math:: z = c\,\tanh(s\,W y / c)

    The model owns W, its own head; c may be None.
    """

    def __init__(self, linear: nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that its weight has one name
        self.scale, self.cap = scale, cap

    @property
    def linear(self) -> nn.Module:
        """W as a module."""
        return self._linear[0]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Compute logits ``[..., V]`` of ``y``, ``[..., D]``."""
        logits: torch.Tensor = self.linear(y)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def head_of(model: Any, config: Any) -> nn.Module:
    """Return a model's head, from f to logits; a plain linear stays one: the loss is fast for it.

    The model of transformers writes text or classifies sequences; ``config`` is that of its text.
    """
    score: nn.Module | None = score_of(model)
    if score is not None:
        return score
    linear: nn.Module = model.get_output_embeddings()
    project_out = getattr(model.get_decoder(), "project_out", None)
    if project_out is not None:
        return ProjectedHead(project_out, linear)
    cap = getattr(config, "final_logit_softcapping", None)
    scale = _scale(config)
    return linear if cap is None and scale == 1 else ScaledHead(linear, scale, cap)


def _scale(config: Any) -> float:
    signs = {**_FACTORS, **_OTHER_SIGN.get(config.model_type, {})}
    scale = 1.0
    for name, sign in signs.items():
        scale *= float(getattr(config, name, None) or 1.0) ** sign
    return scale
