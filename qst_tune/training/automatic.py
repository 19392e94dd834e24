"""``device: auto`` and ``dtype: auto``: what this machine has."""

import torch

AUTO = "auto"
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def automatic_device() -> str:
    """Return what ``auto`` is here: a GPU of NVIDIA or AMD, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Return what ``auto`` is on a device: bf16 if it computes in it; else fp16 on CUDA, else fp32.

    On a CPU bf16 takes half the memory of fp32, and is faster where there are instructions for it:
    ``smollm2/135M_qst`` with batch_size=4 trains at 261 and 313 tokens/s in bf16, at 118 and 173 in
    fp32 (one core of an AMD EPYC with avx512_bf16, shared; two runs each).
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
