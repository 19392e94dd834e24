"""``device: auto`` and ``dtype: auto``: what this machine has."""

import torch

AUTO = "auto"
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def automatic_device() -> str:
    """Return the device that ``auto`` is on this machine.

    Returns:
        str: a GPU of NVIDIA or AMD if there is one, else Apple's, else the CPU.
    """
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that ``auto`` is on a device.

    On a CPU bf16 halves the memory that the backbone takes; SmolLM2-135M trains with it as fast as
    with fp32 or faster (docs/training.md).

    Args:
        device (torch.device): of the model.

    Returns:
        torch.dtype: bf16 where the device computes in it; else fp16 on CUDA, else fp32.
    """
    if device.type == "cuda":
        # The cards before Ampere (T4, V100) emulate bf16, slowly.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return torch.bfloat16 if _computes_in_bf16(device) else torch.float32


def _computes_in_bf16(device: torch.device) -> bool:
    try:
        one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
        return bool((one @ one).item() == 1)
    except (RuntimeError, TypeError):  # torch's own, before macOS 14
        return False
