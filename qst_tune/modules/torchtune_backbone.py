"""A torchtune decoder as the frozen backbone of a side network."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import TransformerDecoder

from qst_tune.modules.backbone import Head, Visit
from qst_tune.modules.backbone_formats import (
    BaseQuantization,
    EmbeddingQuantization,
    quantization_of_backbone,
    quantize_embedding,
    quantize_linears,
)
from qst_tune.modules.batch_parts import CHUNK_TOKENS, module_in_parts
from qst_tune.modules.fused_layers import add_attention, add_mlp_, has_two_halves
from qst_tune.modules.lora import LayerLoRA
from qst_tune.modules.lora_targets import LinearSizes, linears_below
from qst_tune.modules.side.block import (
    SideShape,
    build_side_blocks,
    layer_sizes,
    resize_norm,
    side_shape,
)
from qst_tune.torchtune_compat import Mask


class TorchtuneBackbone:
    """Runs a torchtune decoder forward, layer by layer; see :class:`~.backbone.Backbone`.

    Side blocks are the backbone's own layer type at the width of the side network. The decoder is
    referred to, not owned: its parameters keep their names. A batch of more than ``chunk_tokens``
    goes through each layer in parts.
    """

    can_split = True

    def __init__(self, decoder: TransformerDecoder, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.decoder: Any = decoder
        self.chunk_tokens = chunk_tokens
        self.width: int = decoder.layers[0].attn.embed_dim
        self.num_layers = len(decoder.layers)
        self.max_seq_len: int = decoder.max_seq_len
        self.head: Head = decoder.output
        self.embedding: nn.Embedding = decoder.tok_embeddings

    @property
    def quantization(self) -> str:
        """How layers and embedding are stored."""
        return quantization_of_backbone(self.decoder)

    def quantize(
        self, base_quantization: BaseQuantization, embedding_quantization: EmbeddingQuantization
    ) -> None:
        """Store layers and embedding in these formats, in place."""
        quantize_linears(self.decoder.layers, base_quantization)
        quantize_embedding(self.decoder, embedding_quantization)

    def linear_sizes(self, index: int) -> LinearSizes:
        """Return all linears of a layer."""
        return linears_below(self.decoder.layers[index])

    def side_shape(self, reduction_factor: int, min_head_dim: int) -> SideShape:
        """Choose the sizes of a side block."""
        return side_shape(layer_sizes(self.decoder.layers[0]), reduction_factor, min_head_dim)

    def side_blocks(self, layers: Sequence[int], shape: SideShape) -> nn.ModuleList:
        """Build a side block of the type of each of these layers."""
        return build_side_blocks([self.decoder.layers[index] for index in layers], shape)

    def side_norm(self, dim: int) -> nn.Module:
        """Build a norm of the type of the final one."""
        return resize_norm(self.decoder.norm, dim)

    def row_parts(self, tokens: torch.Tensor, mask: Mask | None) -> list[slice]:
        """Return all rows as one part: they are split layer by layer."""
        return [slice(0, len(tokens))]

    def embed(self, tokens: torch.Tensor, **where: Mask | None) -> torch.Tensor:
        """Compute h_0; rotary positions are not in it."""
        return self._frozen(self.decoder.tok_embeddings, tokens)

    def run(
        self,
        tokens: torch.Tensor,
        *,
        taps: Sequence[int],
        visit: Visit,
        lora: LayerLoRA | None = None,
        **where: Mask | None,
    ) -> torch.Tensor:
        """Run forward, and show hidden states as they come."""
        split = self.num_layers if lora is None else lora.first
        shown: Any = {"taps": taps, "visit": visit, **where}
        h_BTD = self.prefix(tokens, until=split, **shown)
        return self.suffix(tokens, h_BTD, since=split, lora=lora, **shown)

    def prefix(
        self,
        tokens: torch.Tensor,
        *,
        until: int,
        taps: Sequence[int],
        visit: Visit,
        **where: Mask | None,
    ) -> torch.Tensor:
        """Run the first layers without gradient."""
        h_BTD = self.embed(tokens, **where)
        if 0 in taps:
            visit(h_BTD)
        for index, layer in enumerate(islice(self.decoder.layers, until), start=1):
            for compute in self._frozen_parts(layer, h_BTD, where):
                h_BTD = compute(h_BTD, **where)
            if index in taps:
                visit(h_BTD)
        return h_BTD

    def suffix(
        self,
        tokens: torch.Tensor,
        h_BTD: torch.Tensor,
        *,
        since: int,
        taps: Sequence[int],
        visit: Visit,
        lora: LayerLoRA | None = None,
        **where: Mask | None,
    ) -> torch.Tensor:
        """Run the other layers and the norm, with a gradient for LoRA if there is any."""
        layers = self.decoder.layers
        trains = lora is not None and torch.is_grad_enabled()
        with lora.trained(layers) if lora else nullcontext():
            for index, layer in enumerate(islice(layers, since, None), start=since + 1):
                parts = self._frozen_parts(layer, h_BTD, where)
                for compute in [partial(self._trained, layer)] if trains else parts:
                    h_BTD = compute(h_BTD, **where)
                if index in taps:
                    visit(h_BTD.detach())
        return (self._trained if trains else self._frozen)(self.decoder.norm, h_BTD)

    def _trained(self, module: nn.Module, x: torch.Tensor, **where: Mask | None) -> torch.Tensor:
        """Run a module of the backbone through which a gradient flows."""
        output: torch.Tensor = module(x, **where)
        if isinstance(module, FSDPModule):
            module.reshard()
        return output

    def _frozen_parts(
        self, layer: nn.Module, x: torch.Tensor, where: dict[str, Mask | None]
    ) -> list[Callable[..., torch.Tensor]]:
        """What computes a layer, one after the other: the state before each can be released."""
        with torch.no_grad():
            if not has_two_halves(layer, x):
                return [partial(self._frozen, layer)]
        halves = (
            partial(add_attention, layer, self._rows_at_once(x, where)),
            partial(add_mlp_, layer),
        )
        return [torch.no_grad()(half) for half in halves]

    def _rows_at_once(self, x: torch.Tensor, where: dict[str, Mask | None]) -> int:
        # A cache is written for all rows. A BlockMask (packed batches on CUDA) counts its rows from
        # the first; flex_attention takes fewer rows without an error and masks them wrongly.
        indivisible = self.decoder.caches_are_enabled() or isinstance(where.get("mask"), BlockMask)
        return len(x) if indivisible else max(1, self.chunk_tokens // x.shape[1])

    @torch.no_grad()
    def _frozen(self, module: nn.Module, x: torch.Tensor, **where: Mask | None) -> torch.Tensor:
        """Run a module of the backbone, some rows of the batch at a time, saving nothing.

        A module that FSDP has sharded is gathered once for all of them: processes whose batches
        have different sizes stay in step.
        """
        rows = self._rows_at_once(x, where)
        is_whole = rows >= len(x)
        output = module(x, **where) if is_whole else module_in_parts(module, x, rows, **where)
        if isinstance(module, FSDPModule):
            module.reshard()
        return output


def decoder_parts(backbone: TransformerDecoder) -> dict[str, Any]:
    """Return the arguments that make a ``TransformerDecoder`` of the same modules, not copied."""
    names = ("tok_embeddings", "layers", "max_seq_len", "num_heads", "head_dim", "norm", "output")
    return {name: getattr(backbone, name) for name in names}
