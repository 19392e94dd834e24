"""The models of both methods over a decoder of transformers."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from qst_tune.backbone.masks import causal_mask, positions
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.modules.backbone import Head, head_output
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.peqa_model import PEQAModel, scales_of
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork


class TransformersModel(nn.Module):
    """torchtune's names for the parts of a decoder, which has its parameters under ``frozen.``."""

    num_output_chunks: int
    takes_padding = True

    @property
    def backbone(self) -> TransformersBackbone:
        """The decoder."""
        frozen: Any = self.frozen
        backbone: TransformersBackbone = frozen
        return backbone

    @property
    def max_seq_len(self) -> int:
        """The backbone's."""
        return self.backbone.max_seq_len

    @property
    def output(self) -> Head:
        """The LM head, with the model's own soft cap and scale."""
        return self.backbone.head

    @property
    def tok_embeddings(self) -> Any:
        """The token embedding."""
        return self.backbone.embedding

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers."""
        return self.backbone.layers

    @property
    def is_tied(self) -> bool:
        """Whether the LM head reads the embedding's weight."""
        head = self.backbone.model.get_output_embeddings()
        return bool(head.weight is self.tok_embeddings.weight)

    def caches_are_enabled(self) -> bool:
        """Whether keys and values are cached, so that a pass depends on those before it."""
        return self.backbone.cache is not None

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Return logits in this number of chunks along the tokens, for torchtune's chunked loss."""
        self.num_output_chunks = num_output_chunks


class QSTTransformer(TransformersModel, QSTModel):
    """Quantized Side Tuning over any decoder that transformers can load, which is frozen.

    ValueError if a side block belongs to a layer that it lacks.
    """

    def __init__(self, backbone: TransformersBackbone, side: SideNetwork) -> None:
        super().__init__()
        self.frozen = backbone
        self.adopt(side)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits of tokens ``[B, T]``, as ``head_output`` returns them.

        ``mask`` is padding ``[B, L]``, false where there is some, or ``[B, T, L]`` booleans of
        packed rows, True where a token may attend; None: causal. Positions ``[B, T]`` begin again
        with each packed sample.
        """
        (y_BTD,) = self._head_inputs([self.side], tokens, mask=mask, input_pos=input_pos)
        return head_output(self, y_BTD)

    def side_where(self, tokens: torch.Tensor, **where: Any) -> dict[str, Any]:
        """Mask and positions for torchtune's layers: padding becomes a mask ``[B, T, L]``."""
        padding, num_new = where.get("mask"), tokens.shape[1]
        cache = self.backbone.cache
        if padding is None and cache is not None:
            length = cache.length + num_new
            padding = torch.ones(len(tokens), length, dtype=torch.bool, device=tokens.device)
        if not isinstance(padding, torch.Tensor) or padding.ndim != 2:
            return super().side_where(tokens, **where)
        input_pos = where.get("input_pos")
        return {
            "mask": causal_mask(padding, num_new),
            "input_pos": positions(padding, num_new) if input_pos is None else input_pos,
        }


class PEQATransformer(TransformersModel, PEQAModel):
    """A model of transformers whose linears and experts are integers with trained scales.

    All else is frozen, and dropout stays off. ValueError if it has no integer linear.
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
        """Compute logits; arguments as for :meth:`QSTTransformer.forward`."""
        if torch.is_grad_enabled() and not self._has_run:
            self._has_run = True
            find_overwritten_outputs(self.backbone)
        f_BTD = self.backbone.last_state(tokens, mask=mask, input_pos=input_pos)
        return head_output(self, f_BTD)


@torch.no_grad()
def find_overwritten_outputs(backbone: TransformersBackbone) -> None:
    """Let linears save inputs for backward where the model changes outputs in place (Falcon)."""
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
