"""The QST model over any backbone: the backbone only runs forward, the side network trains."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from qst_tune.modules.backbone import Backbone, where_of_rows
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.side.network import SideNetwork
from qst_tune.torchtune_compat import Mask

# Channels a head: torch's flex_attention refuses fewer (torch 2.11, CUDA).
_NARROWEST_FLEX_HEAD = 16


SIDE_PREFIX = "side."


def is_side(path: str) -> bool:
    """Whether a module or a parameter of this path belongs to the side network."""
    return f"{path}.".startswith(SIDE_PREFIX)


class QSTModel(nn.Module):
    """Quantized Side Tuning over a :class:`~qst_tune.modules.backbone.Backbone`.

    The backbone runs under ``no_grad``, interleaved with the side network: after each layer that
    the side network reads, its next block runs. So nothing of the backbone is saved for backward
    except what a downsampler needs for its own gradient, and the hidden states are never in memory
    together.

    Source: QST (https://arxiv.org/abs/2401.07159); equations in
    :class:`~qst_tune.modules.side.network.SideNetwork`.

    This is what :class:`~qst_tune.modules.qst_decoder.QSTDecoder` (torchtune) and
    :class:`~qst_tune.backbone.transformers_models.QSTTransformer` (transformers) share; each
    defines where its parameters are.

    Attributes:
        side (SideNetwork): its blocks belong to layers of the backbone.
        skip_output_layer (bool): return the LM head's input instead of logits.
        num_output_chunks (int): return so many chunks of logits; 0: one tensor.
        hidden_state_cache (HiddenStateCache | None): set if batches repeat: the backbone then runs
            once on each of them.
    """

    side: SideNetwork
    skip_output_layer: bool
    num_output_chunks: int
    hidden_state_cache: HiddenStateCache | None
    # Of the decoder, torchtune's names: its LM head, embedding, layers and longest sequence.
    output: Any
    tok_embeddings: Any
    layers: Any
    max_seq_len: Any
    # Whether ``mask`` may be padding, [B, L], which the model makes masks of itself.
    takes_padding = False

    @property
    def backbone(self) -> Backbone:
        """The frozen decoder."""
        raise NotImplementedError

    def adopt(self, side: SideNetwork) -> None:
        """Freeze the backbone and take over the side network.

        ValueError if a side block belongs to a layer that the backbone does not have.
        """
        num_layers = self.backbone.num_layers
        if max(side.layers) >= num_layers:
            raise ValueError(
                f"a side block belongs to layer {max(side.layers)}, but the backbone has only "
                f"layers 0 to {num_layers - 1}"
            )
        self.requires_grad_(False)
        self.side = side
        self.skip_output_layer = False
        self.num_output_chunks = 0
        self.hidden_state_cache = None
        self.reference_side: SideNetwork | None = None

    def caches_are_enabled(self) -> bool:
        """Whether keys and values are cached, so that a pass depends on those before it."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "QSTModel":
        """Switch the side network's mode; the backbone always evaluates."""
        super().train(False)
        self.training = mode
        self.side.train(mode)
        return self

    def initialize_side(self, device: torch.device) -> None:
        """Give a side network on meta its first values, in place, on this device."""
        if any(parameter.is_meta for parameter in self.side.parameters()):
            self.side.materialize(device)

    def keep_reference(self) -> None:
        """Let :meth:`with_reference` compare with the model as it is now, not with the backbone.

        The model gets a frozen copy of its side network, which reads the same hidden states.
        """
        reference = copy.deepcopy(self.side).eval().requires_grad_(False)
        reference.recompute = False
        # Not a submodule: it is neither trained nor saved.
        object.__setattr__(self, "reference_side", reference)

    def with_reference(
        self,
        tokens: torch.Tensor,
        *,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute inputs of the LM head, ``[B, T, D]``, of the model and of its reference model.

        The reference model of preference learning is the backbone alone, which costs no more than
        its LM head; or, after :meth:`keep_reference`, the model at that time, whose side network
        reads the states of the same pass.
        """
        return self._both(
            tokens, mask=mask, input_pos=input_pos, reference_side=self.reference_side
        )

    def side_where(self, tokens: torch.Tensor, **where: Any) -> dict[str, Any]:
        """Return ``mask`` and ``input_pos`` as the side network takes them.

        The mask of packed rows on CUDA becomes ``[B, T, T]`` where its heads are too narrow for
        torch's flex_attention, as those of ``variant="paper"`` are.
        """
        mask = where.get("mask")
        if not isinstance(mask, BlockMask):
            return where
        block: Any = self.side.blocks[0]
        if block.attn.head_dim >= _NARROWEST_FLEX_HEAD:
            return where
        batch, length = tokens.shape
        dense = create_mask(mask.mask_mod, batch, None, length, length, device=tokens.device)
        return {**where, "mask": dense.squeeze(1)}

    def _both(
        self,
        tokens: torch.Tensor,
        *,
        mask: Mask | None,
        input_pos: torch.Tensor | None,
        reference_side: SideNetwork | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's input of the model, and that of the reference or of the backbone alone.

        A large batch runs in parts, if the backbone chooses so.
        """
        # A method of its own: FSDP wraps with_reference, and forward must not enter it twice.
        sides = [self.side] if reference_side is None else [self.side, reference_side]
        parts = self.backbone.row_parts(tokens, mask)
        if len(parts) == 1 or not self.side.rows_are_alike:
            return self._rows(sides, tokens, mask=mask, input_pos=input_pos)
        where = {"mask": mask, "input_pos": input_pos}
        pairs = [
            self._rows(sides, tokens[rows], **where_of_rows(where, rows, len(tokens)))
            for rows in parts
        ]
        y, reference = zip(*pairs, strict=True)
        return torch.cat(y), torch.cat(reference)

    def _rows(
        self, sides: list[SideNetwork], tokens: torch.Tensor, **where: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.side.disabled:
            f_BTD = self.backbone.run(tokens, taps=(), visit=lambda h: None, **where)
            return f_BTD, f_BTD
        steps = _SideSteps(sides, self.side_where(tokens, **where))
        f_BTD = self._run(tokens, steps, **where)
        y_BTD, *reference = steps.finish(f_BTD)
        return y_BTD, reference[0] if reference else f_BTD

    def _run(self, tokens: torch.Tensor, steps: "_SideSteps", **where: Any) -> torch.Tensor:
        """Run the backbone, or read what it made of this batch before."""
        taps = [0, *(index + 1 for index in self.side.layers)]
        if self.hidden_state_cache is None or self.caches_are_enabled():
            return self.backbone.run(tokens, taps=taps, visit=steps, **where)
        states = self.hidden_state_cache.read(tokens, **where)
        if states is not None:
            steps(self.backbone.embed(tokens, **where))
            for _ in self.side.layers:
                steps(next(states))
            (f_BTD,) = states
            return f_BTD
        recorder = self.hidden_state_cache.recorder(tokens, **where)

        def record(h_BTD: torch.Tensor) -> None:
            if steps.have_begun:  # the embedding is cheaper computed than read
                recorder.add(h_BTD)
            steps(h_BTD)

        f_BTD = self.backbone.run(tokens, taps=taps, visit=record, **where)
        recorder.add(f_BTD)
        recorder.write()
        return f_BTD


class _SideSteps:
    """Side networks that advance with each state they get: start, then their blocks."""

    def __init__(self, sides: list[SideNetwork], where: dict[str, Any]) -> None:
        self._sides, self._where = sides, where
        self._states: list[Any] = []
        self._block = 0

    @property
    def have_begun(self) -> bool:
        """Whether the embedding was shown."""
        return bool(self._states)

    def __call__(self, h_BTD: torch.Tensor) -> None:
        if not self._states:
            self._states = [side.start(h_BTD) for side in self._sides]
            return
        self._states = [
            side.step(self._block, h_BTD, state, **self._where)
            for side, state in zip(self._sides, self._states, strict=True)
        ]
        self._block += 1

    def finish(self, f_BTD: torch.Tensor) -> list[torch.Tensor]:
        """The LM head's input of each."""
        pairs = zip(self._sides, self._states, strict=True)
        return [side.finish(f_BTD, state) for side, state in pairs]
