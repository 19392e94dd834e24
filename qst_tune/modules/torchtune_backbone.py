"""A torchtune decoder as the frozen backbone of a side network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import TransformerDecoder
from torchtune.modules.attention_utils import _MaskType

from qst_tune.modules.backbone import Head, Visit
from qst_tune.modules.base_quantization import BaseQuantization, quantize_linears
from qst_tune.modules.embedding_quantization import (
    EmbeddingQuantization,
    quantization_of_backbone,
    quantize_embedding,
)
from qst_tune.modules.side_block import (
    SideShape,
    build_side_blocks,
    layer_sizes,
    resize_norm,
    side_shape,
)

# Tokens that go through a frozen layer at once: enough for its matrix products to run at full speed
# and to pay for decoding its weights again for each part.
CHUNK_TOKENS = 4096


class TorchtuneBackbone:
    """Runs a torchtune decoder forward, layer by layer; see :class:`~.backbone.Backbone`.

    Side blocks are the backbone's own layer type at the width of the side network.

    Args:
        decoder (TransformerDecoder): referred to, not owned: its parameters keep their names.
        chunk_tokens (int): a batch of more tokens goes through each layer in parts, which bounds
            the memory of its intermediates.
    """

    def __init__(self, decoder: TransformerDecoder, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.decoder: Any = decoder
        self.chunk_tokens = chunk_tokens

    @property
    def width(self) -> int:
        """D."""
        return int(self.decoder.layers[0].attn.embed_dim)

    @property
    def num_layers(self) -> int:
        """N."""
        return len(self.decoder.layers)

    @property
    def max_seq_len(self) -> int:
        """The decoder's."""
        return int(self.decoder.max_seq_len)

    @property
    def head(self) -> Head:
        """The decoder's output layer."""
        head: Head = self.decoder.output
        return head

    @property
    def embedding(self) -> Any:
        """The decoder's token embedding."""
        return self.decoder.tok_embeddings

    @property
    def quantization(self) -> str:
        """How layers and embedding are stored."""
        return quantization_of_backbone(self.decoder)

    def quantize(
        self, base_quantization: BaseQuantization, embedding_quantization: EmbeddingQuantization
    ) -> None:
        """Store layers and embedding in these formats, in place.

        Args:
            base_quantization (BaseQuantization): of the linears of the layers.
            embedding_quantization (EmbeddingQuantization): of embedding and LM head.
        """
        quantize_linears(self.decoder.layers, base_quantization)
        quantize_embedding(self.decoder, embedding_quantization)

    def side_shape(self, reduction_factor: int, min_head_dim: int) -> SideShape:
        """Choose the sizes of a side block.

        Args:
            reduction_factor (int): r.
            min_head_dim (int): least width of a head.

        Returns:
            SideShape: of width D // r.
        """
        return side_shape(layer_sizes(self.decoder.layers[0]), reduction_factor, min_head_dim)

    def side_blocks(self, layers: Sequence[int], shape: SideShape) -> nn.ModuleList:
        """Build a side block of the type of each of these layers.

        Args:
            layers (Sequence[int]): indices.
            shape (SideShape): from :meth:`side_shape`.

        Returns:
            nn.ModuleList: with random weights.
        """
        return build_side_blocks([self.decoder.layers[index] for index in layers], shape)

    def side_norm(self, dim: int) -> nn.Module:
        """Build a norm of the type of the final one.

        Args:
            dim (int): S.

        Returns:
            nn.Module: over ``dim`` channels.
        """
        return resize_norm(self.decoder.norm, dim)

    def row_parts(self, tokens: torch.Tensor, mask: _MaskType | None) -> list[slice]:
        """Return all rows as one part: they are split layer by layer.

        Args:
            tokens (torch.Tensor): ``[B, T]``.
            mask (_MaskType | None): not looked at.

        Returns:
            list[slice]: one.
        """
        return [slice(0, len(tokens))]

    def embed(self, tokens: torch.Tensor, **where: Any) -> torch.Tensor:
        """Compute h_0, ``[B, T, D]``, of ``tokens``; rotary positions are not in it."""
        return self._frozen(self.decoder.tok_embeddings, tokens)

    def run(
        self, tokens: torch.Tensor, *, taps: Sequence[int], visit: Visit, **where: Any
    ) -> torch.Tensor:
        """Run forward without gradient, and show hidden states as they come.

        Args:
            tokens (torch.Tensor): ``[B, T]``.
            taps (Sequence[int]): states to show.
            visit (Visit): called for each.
            **where (Any): ``mask`` and ``input_pos``.

        Returns:
            torch.Tensor: f, ``[B, T, D]``.
        """
        h_BTD = self.embed(tokens, **where)
        if 0 in taps:
            visit(h_BTD)
        for index, layer in enumerate(self.decoder.layers, start=1):
            h_BTD = self._frozen(layer, h_BTD, **where)
            if index in taps:
                visit(h_BTD)
        return self._frozen(self.decoder.norm, h_BTD)

    @torch.no_grad()
    def _frozen(self, module: nn.Module, x: torch.Tensor, **per_row: Any) -> torch.Tensor:
        """Run a module of the backbone, some rows of the batch at a time, saving nothing.

        Without gradient a layer's intermediates (several times the size of its input) are all that
        a long batch costs here. Rows are independent, so doing few at a time bounds them. A module
        that FSDP has sharded is gathered once for all of them, so that processes whose batches have
        different sizes stay in step.
        """
        output = self._in_parts(module, x, **per_row)
        if isinstance(module, FSDPModule):
            module.reshard()
        return output

    def _in_parts(self, module: nn.Module, x: torch.Tensor, **per_row: Any) -> torch.Tensor:
        num_rows = max(1, self.chunk_tokens // x.shape[1])
        # A cache is written for all rows. A BlockMask (packed batches on CUDA) counts its rows from
        # the first; flex_attention takes fewer rows without an error and masks them wrongly.
        indivisible = self.decoder.caches_are_enabled() or isinstance(
            per_row.get("mask"), BlockMask
        )
        if num_rows >= len(x) or indivisible:
            whole: torch.Tensor = module(x, **per_row)
            return whole
        starts = range(0, len(x), num_rows)
        first: torch.Tensor = module(x[:num_rows], **_rows(per_row, 0, num_rows, len(x)))
        output = first.new_empty(len(x), *first.shape[1:])
        output[:num_rows] = first
        for start in starts[1:]:
            stop = start + num_rows
            output[start:stop] = module(x[start:stop], **_rows(per_row, start, stop, len(x)))
        return output


def _rows(per_row: dict[str, Any], start: int, stop: int, batch_size: int) -> dict[str, Any]:
    """The same rows of a mask or of positions; what serves all rows is passed as it is.

    So are positions ``[T]``, of which there may be as many as rows.
    """
    return {
        name: value[start:stop]
        if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch_size
        else value
        for name, value in per_row.items()
    }
