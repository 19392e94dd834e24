"""Compares the fused kernels with torch's operations on a device, before they are used there."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from qst_tune.errors import first_line
from qst_tune.modules.triton_kernels import (
    cross_entropy_,
    gated,
    rms_norm,
    rotate_halves,
    rotate_pairs,
)
from qst_tune.quantization.waves import waves

# Two units in the last place of bf16.
_TOLERANCE = 2.0**-6


@torch.no_grad()
def find_fault(device: str) -> str | None:
    """Return what is wrong with the kernels on this device, or None."""
    try:
        with torch.device("cpu"):
            x = waves(2, 5, 4, 16)
            for name, found, expected in _computed(x, device):
                if not torch.allclose(found.cpu().float(), expected, rtol=_TOLERANCE, atol=1e-3):
                    return f"{name} has other values"
    except Exception as error:  # of Triton's compiler, of the driver, of any kind
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _computed(x: torch.Tensor, device: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the kernels' names, what they compute there, and what torch does here in fp32."""
    there, h = x.to(device), x.float()
    weight = waves(16)
    expected = F.rms_norm(h, (16,), weight.float(), 1e-5)
    yield "RMSNorm", rms_norm(there, weight.to(device), 1e-5), expected
    yield "a gated MLP", gated(there.clone(), there), F.silu(h) * h
    gate, up = h.chunk(2, dim=-1)
    a, b = there.chunk(2, dim=-1)
    yield "a gated MLP of one product", gated(a, b), F.silu(gate) * up
    cos, sin = waves(1, 5, 16), waves(1, 5, 16) * 0.5
    first, second = h.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    expected = h * cos.float()[:, :, None] + turned * sin.float()[:, :, None]
    found = rotate_halves(there.transpose(1, 2), cos.to(device), sin.to(device)).transpose(1, 2)
    yield "rotary embedding of halves", found, expected
    table = torch.stack([cos.float()[0, :, :8], sin.float()[0, :, :8]], dim=-1)
    pair = torch.view_as_complex(h.unflatten(-1, (8, 2)))
    expected = torch.view_as_real(pair * torch.view_as_complex(table)[:, None]).flatten(-2)
    yield "rotary embedding of pairs", rotate_pairs(there, table.to(device)), expected
    logits, labels = x.view(10, 64), torch.arange(10)
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    gradient = logits.float().softmax(-1) - F.one_hot(labels, logits.shape[1])
    found = logits.to(device, copy=True)
    yield "cross entropy", cross_entropy_(found, labels.to(device)), losses
    yield "the gradient of cross entropy", found, gradient
