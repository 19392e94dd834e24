"""The QST model over any backbone: the backbone only runs forward, the side network trains."""

import copy
import itertools
from functools import partial
from typing import Any

import torch
from torch import nn

from qst_tune.modules.backbone import Backbone
from qst_tune.modules.batch_parts import in_parts
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.meta_device import materialize
from qst_tune.modules.side.compute import mask_for_heads
from qst_tune.modules.side.network import SideNetwork
from qst_tune.torchtune_compat import Mask

SIDE_PREFIX = "side."


def is_side(path: str) -> bool:
    """Whether a module or a parameter of this path belongs to the side network."""
    return f"{path}.".startswith(SIDE_PREFIX)


class QSTModel(nn.Module):
    r"""Quantized Side Tuning over a :class:`~qst_tune.modules.backbone.Backbone`.

    .. math::
        h_l = \mathrm{layer}_l(h_{l-1}), \quad g_0 = \mathrm{start}(h_0), \quad
        g_k = \mathrm{step}_k(h_{l(k)}, g_{k-1}), \quad y = \mathrm{finish}(f, g_M)

    The backbone runs under ``no_grad``, interleaved with the side network: after each layer that
    the side network reads, its next block runs. So nothing of the backbone is saved for backward
    except what a downsampler needs for its own gradient, and the hidden states are never in memory
    together.

    Source: QST (https://arxiv.org/abs/2401.07159); start, step and finish are those of
    :class:`~qst_tune.modules.side.network.SideNetwork`. This is what
    :class:`~qst_tune.modules.qst_decoder.QSTDecoder` (torchtune) and
    :class:`~qst_tune.backbone.transformers_models.QSTTransformer` (transformers) share; each
    defines where its parameters are.
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
            materialize(self.side, device)

    def keep_reference(self) -> None:
        """Let :meth:`with_reference` compare with a frozen copy of the side network as it is."""
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

        The reference model of preference learning is the backbone alone; or, after
        :meth:`keep_reference`, the model at that time, whose side network reads the same states.
        """
        return self._both(
            tokens, mask=mask, input_pos=input_pos, reference_side=self.reference_side
        )

    def side_where(self, tokens: torch.Tensor, **where: Mask | None) -> dict[str, Mask | None]:
        """Return ``mask`` and ``input_pos`` as the side network takes them."""
        block: Any = self.side.blocks[0]
        return {**where, "mask": mask_for_heads(where.get("mask"), block.attn.head_dim, tokens)}

    def _both(
        self,
        tokens: torch.Tensor,
        *,
        mask: Mask | None,
        input_pos: torch.Tensor | None,
        reference_side: SideNetwork | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's input of the model, and that of the reference or of the backbone alone."""
        # A method of its own: FSDP wraps with_reference, and forward must not enter it twice.
        sides = [self.side] if reference_side is None else [self.side, reference_side]
        parts = [slice(None)]
        if self.side.rows_are_alike:
            parts = self.backbone.row_parts(tokens, mask)
        compute = partial(self._run_networks, sides)
        y_BTD, reference_BTD = in_parts(compute, parts, tokens, mask=mask, input_pos=input_pos)
        return y_BTD, reference_BTD

    def _run_networks(
        self, sides: list[SideNetwork], tokens: torch.Tensor, **where: Mask | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backbone, and after each layer that they read a block of the side networks."""
        if self.side.disabled:
            f_BTD = self.backbone.run(tokens, taps=(), visit=lambda h: None, **where)
            return f_BTD, f_BTD
        side_where = self.side_where(tokens, **where)
        states: list[Any] = []  # g_k of each side network
        indices = itertools.count()

        def visit(h_BTD: torch.Tensor) -> None:
            if not states:
                states.extend(side.start(h_BTD) for side in sides)
                return
            index = next(indices)
            for number, side in enumerate(sides):
                states[number] = side.step(index, h_BTD, states[number], **side_where)

        taps = [0, *(index + 1 for index in self.side.layers)]
        f_BTD = self._run_backbone(tokens, taps=taps, visit=visit, **where)
        y_BTD, *reference = [side.finish(f_BTD, g) for side, g in zip(sides, states, strict=True)]
        return y_BTD, reference[0] if reference else f_BTD

    def _run_backbone(self, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
        if self.hidden_state_cache is None or self.caches_are_enabled():
            return self.backbone.run(tokens, **how)
        return self.hidden_state_cache.run(self.backbone, tokens, **how)
