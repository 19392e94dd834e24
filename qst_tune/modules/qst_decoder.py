"""The QST model: a frozen decoder that only runs forward, and a side network that trains."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import TransformerDecoder
from torchtune.modules.attention_utils import _MaskType

from qst_tune.modules.decoder_parts import decoder_parts
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.learned_positions import LearnedPositionEmbedding
from qst_tune.modules.side_init import SideInit, initialize_from_backbone
from qst_tune.modules.side_network import SideNetwork


class QSTDecoder(TransformerDecoder):
    """Quantized Side Tuning over any torchtune decoder.

    The backbone's ``tok_embeddings``, ``layers``, ``norm`` and ``output`` keep torchtune's names
    and are frozen; ``side`` is added. So a stock checkpoint loads with exactly the ``side.`` keys
    missing, and torchtune's generation and chunked output see the model they know.

    The backbone runs under ``no_grad``, one layer at a time and interleaved with the side network:
    nothing of it is kept for backward except what a downsampler needs for its own gradient, and the
    hidden states never lie in memory together. A batch of more than ``frozen_chunk_tokens`` tokens
    goes through each frozen layer in parts, which bounds the memory of its intermediates.

    Source: QST (https://arxiv.org/abs/2401.07159); equations in
    :class:`~qst_tune.modules.side_network.SideNetwork`.

    Args:
        backbone (TransformerDecoder): its modules are taken over (not copied) and frozen.
        side (SideNetwork): its blocks stand beside layers of the backbone.
        side_init (SideInit): where :meth:`initialize_side` takes the side blocks' weights from.
            Default: "random".

    Raises:
        ValueError: if a side block stands beside a layer that is not there, ``side_init`` is
            unknown, or the backbone's heads are too narrow to cut the side network's out of them.
    """

    def __init__(
        self, backbone: TransformerDecoder, side: SideNetwork, *, side_init: SideInit = "random"
    ) -> None:
        if side_init not in get_args(SideInit):
            known = ", ".join(get_args(SideInit))
            raise ValueError(f"side_init={side_init!r} is unknown; choose one of {known}")
        if max(side.layers) >= len(backbone.layers):
            raise ValueError(
                f"a side block stands beside layer {max(side.layers)}, but the backbone has only "
                f"layers 0 to {len(backbone.layers) - 1}"
            )
        if side_init != "random":
            _check_heads_can_be_cut(side, backbone, side_init)
        super().__init__(**decoder_parts(backbone))
        self.requires_grad_(False)
        self.side = side
        self.side_init = side_init
        self.skip_output_layer = False
        # Tokens that go through a frozen layer at once: enough for its matrix products to run at
        # full speed and to pay for decoding its weights again for each part.
        self.frozen_chunk_tokens = 4096
        # Set where batches come again: the backbone then runs on each of them once.
        self.hidden_state_cache: HiddenStateCache | None = None
        self.reference_side: SideNetwork | None = None

    def train(self, mode: bool = True) -> "QSTDecoder":
        """Switch the side network between training and evaluation; the backbone always evaluates.

        Args:
            mode (bool): True for training. Default: True.

        Returns:
            QSTDecoder: itself.
        """
        super().train(False)
        self.training = mode
        self.side.train(mode)
        return self

    def initialize_side(self, device: torch.device) -> None:
        """Give the side network its first values, in place; the backbone must have its weights.

        Args:
            device (torch.device): where the side network shall be, if it is on meta.
        """
        if any(parameter.is_meta for parameter in self.side.parameters()):
            self.side.materialize(device)
        if self.side_init != "random":
            initialize_from_backbone(self.side, self, self.side_init)

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Set up key-value caches of the backbone and of the side network.

        Args:
            batch_size (int): number of sequences.
            dtype (torch.dtype): dtype of the caches.
            encoder_max_seq_len (int | None): ignored by decoder-only models.
            decoder_max_seq_len (int | None): length of the caches; default ``max_seq_len``.
        """
        super().setup_caches(batch_size, dtype, decoder_max_seq_len=decoder_max_seq_len)
        for block in self._side_blocks():
            block.setup_caches(
                batch_size,
                dtype,
                encoder_max_seq_len=encoder_max_seq_len,
                decoder_max_seq_len=self.decoder_max_cache_seq_len,
            )

    def reset_caches(self) -> None:
        """Empty the key-value caches of both networks.

        Raises:
            RuntimeError: if no caches are set up.
        """
        super().reset_caches()
        for block in self._side_blocks():
            block.reset_cache()

    def _side_blocks(self) -> Iterable[Any]:
        """The side blocks as the torchtune layers they are; ``nn.Module`` hides their methods."""
        return self.side.blocks

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: _MaskType | None = None,
        encoder_input: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits; arguments and result as torchtune's ``TransformerDecoder.forward``.

        Args:
            tokens (torch.Tensor): ``[B, T]`` token ids.
            mask (_MaskType | None): ``[B, T, T]`` booleans, True where a row may attend; default
                causal. Used by both networks.
            encoder_input (torch.Tensor | None): not supported, must be None.
            encoder_mask (torch.Tensor | None): not supported, must be None.
            input_pos (torch.Tensor | None): ``[B, T]`` positions, for packed or padded sequences.

        Returns:
            torch.Tensor | list[torch.Tensor]: fp32 logits ``[B, T, V]``; chunks of logits after
            ``set_num_output_chunks``; the head's input ``[B, T, D]`` if ``skip_output_layer``.
        """
        self._validate_inputs(
            tokens.shape[1],
            mask=mask,
            encoder_input=encoder_input,
            encoder_mask=encoder_mask,
            input_pos=input_pos,
        )
        if self.side.disabled:
            y_BTD = self._backbone_only(tokens, mask=mask, input_pos=input_pos)
        else:
            y_BTD, _ = self._both(tokens, mask=mask, input_pos=input_pos)
        if self.skip_output_layer:
            return y_BTD
        if self.num_output_chunks > 0:
            chunks: list[torch.Tensor] = self.chunked_output(y_BTD)
            return chunks
        logits: torch.Tensor = self.output(y_BTD).float()
        return logits

    def keep_reference(self) -> None:
        """Let :meth:`with_reference` compare with the model as it is now, not with the backbone.

        A frozen copy of the side network is kept; it reads the same hidden states.
        """
        reference = copy.deepcopy(self.side).eval().requires_grad_(False)
        reference.recompute = False
        # Not a submodule: it is neither trained nor saved.
        object.__setattr__(self, "reference_side", reference)

    def with_reference(
        self,
        tokens: torch.Tensor,
        *,
        mask: _MaskType | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run both networks once: what the side network makes, and what the reference model would.

        The reference model of preference learning is the backbone alone, for no more than its LM
        head; or, after :meth:`keep_reference`, the model of that moment, whose side network reads
        the states of the same pass.

        Args:
            tokens (torch.Tensor): as for :meth:`forward`.
            mask (_MaskType | None): as for :meth:`forward`.
            input_pos (torch.Tensor | None): as for :meth:`forward`.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: inputs of the LM head of the model and of the
            reference model, ``[B, T, D]``.
        """
        return self._both(
            tokens, mask=mask, input_pos=input_pos, reference_side=self.reference_side
        )

    def _both(
        self,
        tokens: torch.Tensor,
        *,
        mask: _MaskType | None,
        input_pos: torch.Tensor | None,
        reference_side: SideNetwork | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's input of the model, and that of the reference or of the backbone alone."""
        # A method of its own: FSDP wraps with_reference, and forward must not enter it twice.
        sides = [self.side] if reference_side is None else [self.side, reference_side]
        h_BTD = self._embed(tokens, mask=mask, input_pos=input_pos)
        carried = [side.start(h_BTD) for side in sides]
        states = self._states(h_BTD, mask=mask, input_pos=input_pos)
        if self.hidden_state_cache is not None and not self.caches_are_enabled():
            states = self.hidden_state_cache(states, tokens, mask=mask, input_pos=input_pos)
        del h_BTD
        for block in range(len(self.side.layers)):
            h_BTD = next(states)
            carried = [
                side.step(block, h_BTD, g_BTS, mask=mask, input_pos=input_pos)
                for side, g_BTS in zip(sides, carried, strict=True)
            ]
            del h_BTD
        (f_BTD,) = states
        y_BTD, *reference = (
            side.finish(f_BTD, g_BTS) for side, g_BTS in zip(sides, carried, strict=True)
        )
        return y_BTD, reference[0] if reference else f_BTD

    def _states(self, h_BTD: torch.Tensor, **per_row: Any) -> Iterator[torch.Tensor]:
        """What each side block reads, then f; a layer runs when what follows it is asked for."""
        beside = set(self.side.layers)
        for index, layer in enumerate(self.layers):
            if index in beside and self.side.reads == "input":
                yield h_BTD
            h_BTD = self._frozen(layer, h_BTD, **per_row)
            if index in beside and self.side.reads == "output":
                yield h_BTD
        yield self._frozen(self.norm, h_BTD)

    def _backbone_only(
        self, tokens: torch.Tensor, *, mask: _MaskType | None, input_pos: torch.Tensor | None
    ) -> torch.Tensor:
        """The input of the LM head as the backbone alone gives it, ``[B, T, D]``."""
        h_BTD = self._embed(tokens, mask=mask, input_pos=input_pos)
        for layer in self.layers:
            h_BTD = self._frozen(layer, h_BTD, mask=mask, input_pos=input_pos)
        return self._frozen(self.norm, h_BTD)

    def _embed(self, tokens: torch.Tensor, **where: Any) -> torch.Tensor:
        """The backbone's embedding; only a learned one wants to know the tokens' positions."""
        learned = isinstance(self.tok_embeddings, LearnedPositionEmbedding)
        return self._frozen(self.tok_embeddings, tokens, **(where if learned else {}))

    @torch.no_grad()
    def _frozen(self, module: nn.Module, x: torch.Tensor, **per_row: Any) -> torch.Tensor:
        """Run a module of the backbone, some rows of the batch at a time, keeping nothing.

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
        num_rows = max(1, self.frozen_chunk_tokens // x.shape[1])
        # A cache is written for all rows. A BlockMask (packed batches on CUDA) counts its rows from
        # the first; flex_attention takes fewer rows without an error and masks them wrongly.
        indivisible = self.caches_are_enabled() or isinstance(per_row.get("mask"), BlockMask)
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


def _check_heads_can_be_cut(side: Any, backbone: Any, side_init: SideInit) -> None:
    own, source = side.blocks[0].attn.head_dim, backbone.layers[0].attn.head_dim
    if own > source:
        raise ValueError(
            f"side_init={side_init!r} cuts the side network's heads, {own} wide, out of the "
            f"backbone's, which are {source} wide: set min_head_dim to at most {source}"
        )
