"""The QST model over any backbone: a side network trains, and LoRA in its last layers, if any."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from qst_tune.modules.backbone import Backbone, Visit
from qst_tune.modules.batch_parts import in_parts
from qst_tune.modules.captured_passes import MOST_TOKENS_WITH_LORA, CapturedPasses
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.meta_device import materialize
from qst_tune.modules.shared_pass import SharedPass
from qst_tune.modules.side.compute import mask_for_heads
from qst_tune.modules.side.network import SideNetwork
from qst_tune.modules.side.one_pass import SidePass, visiting
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
    together. With ``lora_layers`` k the last k layers compute with LoRA and pass a gradient on to
    each other, and none to the layers before them.

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
    captured_passes: CapturedPasses | None
    shared_pass: SharedPass | None
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
        num_layers, last = self.backbone.num_layers, max(side.layers, default=0)
        if last >= num_layers:
            raise ValueError(
                f"a side block belongs to layer {last}, but the backbone has only "
                f"layers 0 to {num_layers - 1}"
            )
        self.requires_grad_(False)
        self.side = side
        self.skip_output_layer = False
        self.num_output_chunks = 0
        self.hidden_state_cache = None
        self.captured_passes = None
        self.shared_pass = None
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
        :meth:`keep_reference`, the model at that time. Layers without LoRA run once for both.
        """
        y_BTD, reference_BTD = self._head_inputs(
            [self.side, self.reference_side], tokens, mask=mask, input_pos=input_pos
        )
        return y_BTD, reference_BTD

    def side_where(self, tokens: torch.Tensor, **where: Mask | None) -> dict[str, Mask | None]:
        """Return ``mask`` and ``input_pos`` as the side network takes them."""
        block: Any = self.side.blocks[0]
        return {**where, "mask": mask_for_heads(where.get("mask"), block.attn.head_dim, tokens)}

    def _head_inputs(
        self, sides: Sequence[SideNetwork | None], tokens: torch.Tensor, **where: Mask | None
    ) -> tuple[torch.Tensor, ...]:
        """The head's input with each of these side networks; None: of the backbone alone."""
        # A method of its own: FSDP wraps with_reference, and forward must not enter it twice.
        side: Any = self.side
        parts = [slice(None)]
        if side.rows_are_alike:
            parts = self.backbone.row_parts(tokens, where.get("mask"))
        else:
            side.take_rows(tokens)
        compute = partial(in_parts, partial(self._run_networks, sides), parts)
        captured = self.captured_passes
        if captured is None or len(parts) > 1 or not self._can_be_captured(sides, tokens):
            return compute(tokens, **where)
        networks = [network for network in sides if network is not None]
        return captured.run(
            compute,
            partial(self._run_saving_all, networks, compute),
            networks,
            (side.training, *map(id, sides)),
            tokens,
            **where,
        )

    def _can_be_captured(self, sides: Sequence[SideNetwork | None], tokens: torch.Tensor) -> bool:
        """Whether a pass is the same kernels each time, over weights that stay where they are."""
        side: Any = self.side
        keeps = self.hidden_state_cache is not None or self.shared_pass is not None
        is_alone = not keeps and not self.caches_are_enabled()
        if not is_alone or not side.rows_are_alike or side.disabled:
            return False
        if side.lora is None:
            return True
        draws_again = side.lora.restores_dropout and side.training
        return not draws_again and tokens.numel() <= MOST_TOKENS_WITH_LORA

    def _run_saving_all(
        self,
        networks: Sequence[SideNetwork],
        compute: Callable[..., tuple[torch.Tensor, ...]],
        tokens: torch.Tensor,
        **where: Mask | None,
    ) -> tuple[torch.Tensor, ...]:
        """Run without recomputing the side blocks, which a graph cannot and few tokens need not."""
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(network.saving_all())
            return compute(tokens, **where)

    def _run_networks(
        self, sides: Sequence[SideNetwork | None], tokens: torch.Tensor, **where: Mask | None
    ) -> tuple[torch.Tensor, ...]:
        """Run the backbone, and after each layer that they read a block of the side networks."""
        if self.side.disabled:
            f_BTD = self.backbone.run(tokens, taps=(), visit=lambda h: None, **where)
            return (f_BTD,) * len(sides)
        side_where = self.side_where(tokens, **where) if self.side.layers else {}
        passes = [SidePass(side, side_where) for side in sides]
        states = self._last_states(passes, tokens, **where)
        return tuple(one.finish(f_BTD) for one, f_BTD in zip(passes, states, strict=True))

    def _last_states(
        self, passes: Sequence[SidePass], tokens: torch.Tensor, **where: Any
    ) -> list[torch.Tensor]:
        """Run the layers without LoRA once and the others for each network; f of each."""
        backbone, lora, visit = self.backbone, self.side.lora, visiting(passes)
        taps = [0, *(index + 1 for index in self.side.layers)] if self.side.layers else []
        if lora is None:
            return [self._frozen_state(tokens, taps, visit, None, **where)] * len(passes)
        is_kept = self.hidden_state_cache is not None or self.shared_pass is not None
        is_cached = is_kept and not self.caches_are_enabled()
        if len(passes) == 1 and not is_cached:
            return [backbone.run(tokens, taps=taps, visit=visit, lora=lora, **where)]
        if not backbone.can_split:
            return [one.run(backbone, tokens, taps=taps, **where) for one in passes]
        before = [tap for tap in taps if tap <= lora.first]
        h_BTD = self._frozen_state(tokens, before, visit, lora.first, **where)
        how = {"since": lora.first, "taps": taps[len(before) :], **where}
        return [one.run_suffix(backbone, tokens, h_BTD, **how) for one in passes]

    def _frozen_state(
        self,
        tokens: torch.Tensor,
        taps: Sequence[int],
        visit: Visit,
        until: int | None,
        **where: Mask | None,
    ) -> torch.Tensor:
        """Return state ``until`` (None: f), after showing others: computed, or as it was before.

        What another network has read of this batch is in memory, what another epoch has on disk.
        """
        backbone: Any = self.backbone

        def computed(*, taps: Sequence[int], visit: Visit, until: int | None) -> torch.Tensor:
            run = backbone.run if until is None else partial(backbone.prefix, until=until)
            run = partial(run, tokens, **where)
            cache: Any = self.hidden_state_cache
            if cache is not None and not self.caches_are_enabled():
                run = partial(cache.run, run, partial(backbone.embed, tokens, **where), tokens)
                run = partial(run, **where)
            state: torch.Tensor = run(taps=taps, visit=visit)
            return state

        if self.shared_pass is None or self.caches_are_enabled():
            return computed(taps=taps, visit=visit, until=until)
        return self.shared_pass.run(computed, tokens, taps=taps, visit=visit, until=until, **where)
