"""Attention masks of padded rows for the side network, and of packed rows for the backbone."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from qst_tune.backbone.text_model import carries_state, has_windows
from qst_tune.errors import UserError


def causal_mask(padding_BL: torch.Tensor, num_new: int) -> torch.Tensor:
    """Make a causal mask ``[B, T, L]`` that hides padding, false in ``padding_BL``.

    True where a token may attend. Each attends to itself, also padding: a row without any would
    give NaN.
    """
    everywhere = torch.arange(padding_BL.shape[1], device=padding_BL.device)
    new = everywhere[-num_new:, None]
    return ((new >= everywhere) & padding_BL.bool()[:, None, :]) | (new == everywhere)


def positions(padding_BL: torch.Tensor, num_new: int) -> torch.Tensor:
    """Count the positions ``[B, T]`` of the new tokens without padding, false in ``padding_BL``."""
    return (padding_BL.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]


_are_unpacked: ContextVar[bool] = ContextVar("are_unpacked", default=False)


@contextmanager
def rows_unpacked() -> Iterator[None]:
    """Spare transformers the search for packed samples, which waits for the device.

    Where it counts the positions itself, it finds None.
    """
    _let_search_be_spared()
    token = _are_unpacked.set(True)
    try:
        yield
    finally:
        _are_unpacked.reset(token)


@cache
def _let_search_be_spared() -> None:
    masking = sys.modules.get("transformers.masking_utils")
    search = getattr(masking, "find_packed_sequence_indices", None)
    if masking is None or search is None:  # an earlier version
        return

    def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        return None if _are_unpacked.get() else search(position_ids)

    vars(masking)["find_packed_sequence_indices"] = find_packed_sequence_indices


# From the positions of packed rows to what the model takes as its attention mask.
Packing = Callable[[Any, torch.Tensor, torch.dtype], Any]

_FIRST, _SECOND = 5, 4
# Of the largest value of f. Measured on tiny models of 80 types in fp32: right ones differ by 1e-6,
# wrong ones by 1e-2 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.005}


def by_positions(config: Any, input_pos: torch.Tensor, dtype: torch.dtype) -> Any:
    """Give no mask: most models separate samples by positions that begin again."""
    return None


def by_mask_of_each_kind(config: Any, input_pos: torch.Tensor, dtype: torch.dtype) -> Any:
    """Give transformers' own masks by kind of layer, as gpt-oss and others take them."""
    from transformers.masking_utils import create_masks_for_generate

    masks = create_masks_for_generate(**_mask_arguments(config, input_pos, dtype))
    return masks if isinstance(masks, dict) else {"full_attention": masks}


def by_mask(config: Any, input_pos: torch.Tensor, dtype: torch.dtype) -> Any:
    """Give one mask ``[B, 1, T, T]`` for all layers, where none of them has a window."""
    from transformers.masking_utils import create_causal_mask

    if has_windows(config):
        raise ValueError("one mask would take the windows away")
    return create_causal_mask(**_mask_arguments(config, input_pos, dtype))


PACKINGS: tuple[Packing, ...] = (by_positions, by_mask_of_each_kind, by_mask)


def _mask_arguments(config: Any, input_pos: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    # Of the embeddings only shape, dtype and device are looked at.
    shaped = torch.empty(*input_pos.shape, 1, dtype=dtype, device=input_pos.device)
    return {
        "config": config,
        "inputs_embeds": shaped,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": input_pos,
    }


@torch.no_grad()
def find_packing(backbone: Any) -> Packing:
    """Find a way to pack that gives each of two short samples what it gives alone.

    The backbone has its weights and runs a few times. UserError if no way works, or the model
    carries a state along the row.
    """
    if carries_state(backbone.model, backbone.config):
        raise _refusal(backbone.config, "carries a state along the row")
    device = backbone.embedding.weight.device
    tokens = torch.arange(_FIRST + _SECOND, device=device)[None] % backbone.vocab_size
    input_pos = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)])[None].to(device)
    first, second = (backbone.text_state(t) for t in tokens.split([_FIRST, _SECOND], dim=1))
    alone = torch.cat([first, second], dim=1).float()
    precision = first.dtype
    for packing in PACKINGS:
        try:
            together = backbone.text_state(tokens, input_pos=input_pos, packing=packing).float()
        except Exception:  # a model that does not take such a mask fails in its own way
            continue
        if (together - alone).abs().max() <= _TOLERANCE[precision] * alone.abs().max():
            return packing
    raise _refusal(backbone.config, "separates packed samples in no way that is known here")


def _refusal(config: Any, reason: str) -> UserError:
    return UserError(
        f"packed=True: model_type={config.model_type!r} {reason}, so a sample would see the one "
        "before it; use packed=False"
    )
