"""A decoder of transformers as the frozen backbone of a side network."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask

from qst_tune.backbone.cache import TransformersCache
from qst_tune.backbone.experts import ExpertLinears, QuantizedExperts
from qst_tune.backbone.fused_modules import fuse_transformers
from qst_tune.backbone.layer_hooks import (
    before_projection,
    gradient_from,
    is_same,
    other_values,
    run_until,
    showing,
    starting_at,
)
from qst_tune.backbone.masks import Packing, find_packing, positions, rows_unpacked
from qst_tune.backbone.quantizers import (
    linear_sizes,
    quantization_of_text,
    quantize_tables,
    quantize_text,
)
from qst_tune.backbone.side_blocks import side_block, side_norm, text_sizes
from qst_tune.backbone.stored_weights import DirectoryFormat
from qst_tune.backbone.text_model import decoder_of, head_of, layers_of, longest_text
from qst_tune.modules.backbone import Head, Visit
from qst_tune.modules.backbone_formats import EmbeddingQuantization, LinearFormat
from qst_tune.modules.lora import LayerLoRA
from qst_tune.modules.lora_targets import LinearSizes
from qst_tune.modules.side.block import SideShape, side_shape

# Tokens of a batch that run together. On a CPU more would only need more memory. Each part decodes
# all weights anew, which is 8 % of the time of 4096 tokens at 7B on an H200.
CHUNK_TOKENS = {"cpu": 4096, "cuda": 8192}


class TransformersBackbone(nn.Module):
    """Runs a model of transformers forward and shows its hidden states.

    The model's own code computes everything: masks, sliding windows, positions, caches. Hooks on
    its layers hand each state on, at once; see :class:`~qst_tune.modules.backbone.Backbone`. The
    causal language model is taken over, of a vision-language model the one inside. UserError if its
    layers or its LM head cannot be found.

    A 2-d ``mask`` is padding, as transformers' ``attention_mask``. A 3-d one is that of packed rows
    (with a cache, of what is cached): ``input_pos`` then begins again with each sample.

    ``directory`` is the one that describes the model, ``stored`` how it stores its weights.
    ``max_seq_len`` None is the model's number of positions. A batch of more than ``chunk_tokens``
    tokens (None: :data:`CHUNK_TOKENS`) runs in parts. While a ``cache`` is attached, passes read
    and extend it.
    """

    def __init__(
        self,
        model: Any,
        directory: str = "",
        max_seq_len: int | None = None,
        *,
        stored: DirectoryFormat | None = None,
    ) -> None:
        super().__init__()
        self.stored = stored
        self.directory = directory
        self.chunk_tokens: int | None = None
        self.cache: TransformersCache | None = None
        self._packing: Packing | None = None
        self._limit = max_seq_len
        self.embedding_quantization: EmbeddingQuantization = "none"
        self.base_quantization: LinearFormat = "none"
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config(decoder=True)
        # In tuples: the modules belong to the model, where their parameters have their names.
        self._decoder = (decoder_of(model),)
        self._layers = (layers_of(self.decoder, self.config),)
        self._head = (head_of(model, self.config),)
        fuse_transformers(self.decoder)
        self._arguments = frozenset(inspect.signature(self.decoder.forward).parameters)

    @property
    def decoder(self) -> Any:
        """The text model: everything but the LM head."""
        return self._decoder[0]

    @property
    def layers(self) -> nn.ModuleList:
        """Its layers."""
        return self._layers[0]

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """N."""
        return len(self.layers)

    @property
    def max_seq_len(self) -> int:
        """As asked for, else the model's number of positions."""
        return self._limit or longest_text(self.config)

    @property
    def head(self) -> Head:
        """From f to logits, with the model's soft cap and scale."""
        head: Head = self._head[0]
        return head

    @property
    def embedding(self) -> Any:
        """The token embedding."""
        return self.model.get_input_embeddings()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return len(self.embedding.weight)

    @property
    def quantization(self) -> str:
        """How layers and embedding are stored."""
        return quantization_of_text(self.layers, self.embedding)

    def quantize(
        self, base_quantization: LinearFormat, embedding_quantization: EmbeddingQuantization
    ) -> None:
        """Store layers and embedding in these formats, in place; remembered for loading."""
        if base_quantization == "auto":
            base_quantization = "nf4" if self.stored is None else self.stored.default
        self.base_quantization = base_quantization
        self.embedding_quantization = embedding_quantization
        quantize_text(self.layers, base_quantization, self.stored)
        parts = [*self.layers.parameters(), *self.layers.modules()]
        if any(isinstance(part, QuantizedExperts | ExpertLinears) for part in parts):
            # transformers' default multiplies all experts of a layer at once, and so decodes them.
            self.model.set_experts_implementation("eager")
        quantize_tables(self.embedding, self.model, embedding_quantization)

    def linear_sizes(self, index: int) -> LinearSizes:
        """Return the linears of a layer, without those that choose experts."""
        return linear_sizes(self.layers[index])

    def side_shape(self, reduction_factor: int, min_head_dim: int) -> SideShape:
        """Choose the sizes of a side block, of width D // r."""
        return side_shape(text_sizes(self.config), reduction_factor, min_head_dim)

    def side_blocks(self, layers: Sequence[int], shape: SideShape) -> nn.ModuleList:
        """Build a layer at the width of the side network, once for each of these layers."""
        return nn.ModuleList(side_block(self.config, shape) for _ in layers)

    def side_norm(self, dim: int) -> nn.Module:
        """Build the side network's final norm over ``dim`` channels."""
        return side_norm(self.config, dim)

    def new_cache(self) -> TransformersCache:
        """Make an empty cache of keys and values, used while it is attached."""
        return TransformersCache(self)

    def row_parts(self, tokens: torch.Tensor, mask: Any) -> list[slice]:
        """Split a large batch into parts of whole rows.

        Not with a BlockMask, nor a sharded model, of which each part would gather all layers.
        """
        at_once = CHUNK_TOKENS.get(tokens.device.type, CHUNK_TOKENS["cpu"])
        rows = max(1, (self.chunk_tokens or at_once) // tokens.shape[1])
        is_sharded = isinstance(self.layers[0], FSDPModule)
        if self.cache is not None or isinstance(mask, BlockMask) or is_sharded:
            rows = len(tokens)
        return [slice(start, start + rows) for start in range(0, max(1, len(tokens)), rows)]

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor, **where: Any) -> torch.Tensor:
        """Compute h_0, ``[B, T, D]``: run until the first layer begins."""
        return self.prefix(tokens, until=0, taps=(), visit=lambda h: None, **where)

    def run(
        self,
        tokens: torch.Tensor,
        *,
        taps: Sequence[int],
        visit: Visit,
        lora: LayerLoRA | None = None,
        **where: Any,
    ) -> torch.Tensor:
        """Run forward up to f, ``[B, T, D]``; show the states ``taps`` on the way.

        ``visit`` is called for each state in the caller's gradient mode. There is no gradient but
        from the layers with ``lora`` on.
        """
        self._packing_of(where.get("mask"))  # may run the model, so before hooks are there
        with self._showing(taps, visit, tokens), gradient_from(self.layers, lora), torch.no_grad():
            return self.last_state(tokens, **where)

    def prefix(
        self, tokens: torch.Tensor, *, until: int, taps: Sequence[int], visit: Visit, **where: Any
    ) -> torch.Tensor:
        """Run the first layers alone, without gradient: to state ``until``."""
        self._packing_of(where.get("mask"))
        with self._showing(taps, visit, tokens), torch.no_grad():
            state = run_until(self.layers[until], lambda: self.last_state(tokens, **where))
        return _plain(state, tokens, self.config) if until == 0 else state

    def suffix(
        self,
        tokens: torch.Tensor,
        h_BTD: torch.Tensor,
        *,
        since: int,
        taps: Sequence[int],
        visit: Visit,
        lora: LayerLoRA | None = None,
        **where: Any,
    ) -> torch.Tensor:
        """Run the other layers from state ``since`` on, up to f."""
        self._packing_of(where.get("mask"))
        with (
            self._showing(taps, visit, tokens),
            starting_at(self, since, h_BTD, num_others=self._other_values),
            gradient_from(self.layers, lora),
            torch.no_grad(),
        ):
            return self.last_state(tokens, **where)

    @cached_property
    def _other_values(self) -> int | None:
        return other_values(self.layers, lambda: self.text_state(self._probe()))

    @cached_property
    @torch.no_grad()
    def can_split(self) -> bool:
        """Whether a pass in two parts computes the same; runs the model on four tokens."""
        tokens, since = self._probe(), self.num_layers - 1
        shown: Any = {"taps": (), "visit": lambda h: None}
        whole = self.run(tokens, **shown)
        state = self.prefix(tokens, until=since, **shown)
        try:
            return is_same(whole, self.suffix(tokens, state, since=since, **shown))
        except Exception:  # a type's own code misses the keys of a layer that was left out
            return False

    def _probe(self) -> torch.Tensor:
        tokens = torch.arange(4, device=self.embedding.weight.device)[None]
        return tokens % self.vocab_size

    def last_state(
        self, tokens: torch.Tensor, *, mask: Any = None, input_pos: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run up to the LM head, in the caller's gradient mode; arguments as for :meth:`run`."""
        packing = self._packing_of(mask)
        return self.text_state(tokens, mask=mask, input_pos=input_pos, packing=packing)

    def forward(self, tokens: torch.Tensor, **where: Any) -> torch.Tensor:
        """Compute the model's own logits, ``[B, T, V]``; arguments as for :meth:`run`."""
        return self.head(self.last_state(tokens, **where))

    def _packing_of(self, mask: Any) -> Packing | None:
        """How the rows of a batch are packed, if they are; may run the model."""
        if self.cache is not None or mask is None or _is_padding(mask):
            return None
        self._packing = self._packing or find_packing(self)
        return self._packing

    def text_state(
        self,
        tokens: torch.Tensor,
        *,
        mask: Any = None,
        input_pos: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Run the model up to its LM head; a mask that is not padding ``[B, L]`` is not read."""
        inputs = self._inputs(tokens, mask if _is_padding(mask) else None, input_pos)
        if packing is not None and input_pos is not None:
            inputs["attention_mask"] = packing(self.config, input_pos, self.embedding.weight.dtype)
        if self.cache is not None and self.cache.slot is not None:
            inputs["attention_mask"] = mask[:, None]
        projected: list[torch.Tensor] = []
        with ExitStack() as stack:
            if input_pos is None and self.cache is None:
                stack.enter_context(rows_unpacked())
            cache = stack.enter_context(self._extended(tokens.shape[1]))
            stack.enter_context(before_projection(self.decoder, projected))
            f_BTD: torch.Tensor = self.decoder(input_ids=tokens, **inputs, **cache)[0]
        return projected[0] if projected else f_BTD

    @contextmanager
    def _extended(self, num_new: int) -> Iterator[dict[str, Any]]:
        """The arguments that let the model use the cache, if one is attached."""
        if self.cache is None:
            yield {"use_cache": False}
            return
        name = "past_key_values" if "past_key_values" in self._arguments else "cache_params"
        with self.cache.extended(num_new) as cache:
            yield {"use_cache": True, name: cache}

    def _inputs(
        self, tokens: torch.Tensor, padding: torch.Tensor | None, input_pos: torch.Tensor | None
    ) -> dict[str, Any]:
        if padding is not None and input_pos is None:
            input_pos = positions(padding, tokens.shape[1])
        inputs: dict[str, Any] = {}
        # A model of states alone has left padding behind with its first pass.
        only_states = "past_key_values" not in self._arguments
        is_continued = self.cache is not None and self.cache.length > 0
        if padding is not None and not (only_states and is_continued):
            inputs["attention_mask"] = padding.long()
        if input_pos is not None and "position_ids" in self._arguments:
            inputs["position_ids"] = input_pos
        return inputs

    def _showing(
        self, taps: Sequence[int], visit: Visit, tokens: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Show each tapped state as soon as it is there, in the caller's gradient mode."""
        gradient = torch.is_grad_enabled()

        def show(state: torch.Tensor) -> None:
            with torch.set_grad_enabled(gradient):
                visit(_plain(state.detach(), tokens, self.config))

        return showing(self.layers, taps, show)


def transformers_backbone(model: Any) -> TransformersBackbone | None:
    """Return the backbone of a model over transformers, or the model if it is one; else None."""
    backbone = getattr(model, "backbone", model)
    return backbone if isinstance(backbone, TransformersBackbone) else None


def _is_padding(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def _plain(state: torch.Tensor, tokens: torch.Tensor, config: Any) -> torch.Tensor:
    """``[B, T, D]``: of the versions that Gemma 3n carries, the one that its attention reads."""
    if state.ndim == 4 and hasattr(config, "altup_active_idx"):
        return state[config.altup_active_idx]
    return state
