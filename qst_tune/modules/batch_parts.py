"""A large batch runs some rows at a time, which bounds its memory: rows are independent."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qst_tune.quantization.decoded_once import decoding_once
from qst_tune.torchtune_compat import Mask

# Tokens that go through frozen layers at once: enough for products at full speed.
CHUNK_TOKENS = 4096


def where_of_rows(
    where: dict[str, Mask | None], rows: slice | torch.Tensor, batch_size: int
) -> dict[str, Mask | None]:
    """Index mask and positions by rows of the batch; what serves all rows stays whole.

    So do positions ``[T]``, of which there may be as many as rows.
    """
    return {
        name: value[rows]
        if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch_size
        else value
        for name, value in where.items()
    }


def in_parts(
    compute: Callable[..., tuple[torch.Tensor, ...]],
    parts: Sequence[slice],
    tokens: torch.Tensor,
    **where: Mask | None,
) -> tuple[torch.Tensor, ...]:
    """Compute tensors of a batch, some rows at a time."""
    if len(parts) == 1:
        return compute(tokens, **where)
    results = [compute(tokens[rows], **where_of_rows(where, rows, len(tokens))) for rows in parts]
    return tuple(torch.cat(same) for same in zip(*results, strict=True))


def module_in_parts(
    module: nn.Module, x: torch.Tensor, rows_at_once: int, **where: Mask | None
) -> torch.Tensor:
    """Run a module, some rows at a time; its weights are decoded once for all of them."""
    output = torch.empty(0)
    with decoding_once():
        for start in range(0, len(x), rows_at_once):
            rows = slice(start, start + rows_at_once)
            part = module(x[rows], **where_of_rows(where, rows, len(x)))
            output = output if start else part.new_empty(len(x), *part.shape[1:])
            output[rows] = part
    return output
