"""The PEQA model over a decoder of transformers."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.backbone.transformers_model import TransformersModel
from qst_tune.modules.backbone import head_output
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.peqa_model import PEQAModel, scales_of


class PEQATransformer(TransformersModel, PEQAModel):
    """A model of transformers whose linears and experts are integers with trained scales.

    transformers' own code computes everything, here with gradient; dropout stays off. The backbone
    is taken over and frozen except for the scales; ValueError if it has no integer linear.
    """

    def __init__(self, backbone: TransformersBackbone) -> None:
        super().__init__()
        self.frozen = backbone
        self.num_output_chunks = 0
        self._has_run = False
        self.adopt()

    def task(self) -> dict[str, nn.Parameter]:
        """Return what trains, by transformers' names of its modules."""
        return scales_of(self.backbone.model)

    def train(self, mode: bool = True) -> "PEQATransformer":
        """Only mark the mode: transformers' models drop activations in training."""
        super().train(False)
        self.training = mode
        return self

    def forward(
        self, tokens: torch.Tensor, *, mask: Any = None, input_pos: torch.Tensor | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits, as :func:`~qst_tune.modules.backbone.head_output` returns them.

        ``tokens`` are ``[B, T]``. ``mask`` is padding ``[B, L]``, false where there is some, or
        ``[B, T, L]`` of packed rows; None: causal. Positions ``[B, T]`` begin again with each
        packed sample.
        """
        if torch.is_grad_enabled() and not self._has_run:
            self._has_run = True
            find_overwritten_outputs(self.backbone)
        f_BTD = self.backbone.last_state(tokens, mask=mask, input_pos=input_pos)
        return head_output(self, f_BTD)


@torch.no_grad()
def find_overwritten_outputs(backbone: TransformersBackbone) -> None:
    """Let linears save inputs for backward where the model changes outputs in place (Falcon).

    The backbone runs once, on four tokens.
    """
    linears = [m for m in backbone.layers.modules() if isinstance(m, PEQALinear)]
    outputs: list[tuple[torch.Tensor, int]] = []
    with ExitStack() as stack:
        for linear in linears:
            handle = linear.register_forward_hook(
                lambda _, args, output: outputs.append((output, output._version))
            )
            stack.callback(handle.remove)
        tokens = torch.arange(4, device=backbone.embedding.weight.device)[None]
        backbone.text_state(tokens % backbone.vocab_size)
    if any(output._version != version for output, version in outputs):
        for linear in linears:
            linear.output_is_overwritten = True
