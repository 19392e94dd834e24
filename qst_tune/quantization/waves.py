"""Numbers to try kernels on, which are not random: those of a run stay the same."""

import torch


def waves(
    *shape: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return sines of ever larger numbers, computed in fp32."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=device)
    return index.mul_(0.37).sin_().view(shape).to(dtype)
