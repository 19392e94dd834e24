"""What a side network needs of a frozen backbone, whichever library the backbone comes from."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from qst_tune.modules.backbone_formats import BaseQuantization, EmbeddingQuantization
from qst_tune.modules.lora import LayerLoRA
from qst_tune.modules.lora_targets import LinearSizes
from qst_tune.modules.side.block import SideShape
from qst_tune.torchtune_compat import Mask

Head = Callable[[torch.Tensor], torch.Tensor]
# Takes one hidden state, [B, T, D], while the backbone is between two layers.
Visit = Callable[[torch.Tensor], None]


class Backbone(Protocol):
    """A frozen decoder that only runs forward.

    States are counted as transformers counts them: state 0 is the embedding h_0, the input of the
    first layer, and state l the output of the l-th layer. f is the last one after the final norm,
    the input of the LM head.
    """

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""

    @property
    def num_layers(self) -> int:
        """N, the number of layers."""

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that the model computes exactly."""

    @property
    def head(self) -> Head:
        """From f to logits, with the model's own soft cap and scale."""

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding; its weight has the backbone's device and dtype."""

    @property
    def quantization(self) -> str:
        """How the weights are stored; a tuned side network belongs to it."""

    @property
    def can_split(self) -> bool:
        """Whether :meth:`prefix` and :meth:`suffix` can take the place of :meth:`run`."""

    def quantize(
        self, base_quantization: BaseQuantization, embedding_quantization: EmbeddingQuantization
    ) -> None:
        """Store the linears of the layers and the embedding in these formats, in place."""

    def linear_sizes(self, index: int) -> LinearSizes:
        """Return the linears of a layer, counted from 0, that LoRA may change; no routers."""

    def side_shape(self, reduction_factor: int, min_head_dim: int) -> SideShape:
        """Choose the sizes of a side block, of width D // r."""

    def side_blocks(self, layers: Sequence[int], shape: SideShape) -> nn.ModuleList:
        """Build a side block, with random weights, for each of these layers, counted from 0.

        A block has torchtune's layer interface, ``[B, T, S]`` to ``[B, T, S]``.
        """

    def side_norm(self, dim: int) -> nn.Module:
        """Build the side network's final norm over ``dim`` = S channels."""

    def row_parts(self, tokens: torch.Tensor, mask: Mask | None) -> list[slice]:
        """Choose which rows of a batch run together: the memory of a layer grows with them."""

    def embed(
        self,
        tokens: torch.Tensor,
        *,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute h_0 alone, ``[B, T, D]``; arguments as for :meth:`run`."""

    def run(
        self,
        tokens: torch.Tensor,
        *,
        taps: Sequence[int],
        visit: Visit,
        lora: LayerLoRA | None = None,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run forward on ``[B, T]``; return f, ``[B, T, D]``.

        ``visit`` is called once for each state of ``taps`` (ascending), detached, in the caller's
        gradient mode, before the next layer runs: so the hidden states are never in memory
        together. ``mask`` None: each token sees those before it; ``input_pos`` None: counted from
        0. Nothing is saved for backward except, with ``lora``, by the layers that it changes and
        the final norm, which then run in the caller's gradient mode.
        """

    def prefix(
        self,
        tokens: torch.Tensor,
        *,
        until: int,
        taps: Sequence[int],
        visit: Visit,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Do the first part of :meth:`run`: return state ``until`` alone, without gradient."""

    def suffix(
        self,
        tokens: torch.Tensor,
        h_BTD: torch.Tensor,
        *,
        since: int,
        taps: Sequence[int],
        visit: Visit,
        lora: LayerLoRA | None = None,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Do the rest of :meth:`run` from state ``since``, for the taps behind it."""


def head_output(model: Any, y_BTD: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """Return what the loss or the caller asked a model of ours for.

    That is fp32 logits ``[B, T, V]``; chunks of logits after ``set_num_output_chunks``; or
    ``y_BTD`` itself, the input of the LM head, if ``skip_output_layer``.
    """
    if model.skip_output_layer:
        return y_BTD
    if model.num_output_chunks > 0:
        return [model.output(y) for y in y_BTD.chunk(model.num_output_chunks, dim=1)]
    logits: torch.Tensor = model.output(y_BTD).float()
    return logits
