"""The device and the dtype of a config; ``auto`` is what this machine has."""

import torch
from torchtune import training, utils

from qst_tune.errors import UserError, first_line

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


def choose_device(name: str = AUTO) -> torch.device:
    """Return the device of a config's key, with this process's index under torchrun.

    "auto" is what there is. UserError if this machine lacks it.
    """
    if name == AUTO:
        name = automatic_device()
    try:
        device: torch.device = utils.get_device(device=name)
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:  # torch's own
        raise UserError(f"device={name} cannot be used: {first_line(error)}") from error
    if device.type == "meta":
        raise UserError(f"device={name} cannot be used: it has no memory; use cpu or cuda")
    # Without a GPU, torchtune 0.6.1 answers "cuda" with the CPU.
    if device.type != torch.device(name).type:
        raise UserError(
            f"device={name} cannot be used: this machine has none, or torch does not see it; "
            f"use device={device.type}"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the backbone: bfloat16, float16 or float32.

    "auto" is what the device is best at. UserError if the device cannot compute in it.
    """
    if name == AUTO:
        return automatic_dtype(device)
    if name not in DTYPE_NAMES.values():
        raise UserError(f"dtype={name} is not supported: use bf16, fp16 or fp32")
    try:
        dtype: torch.dtype = training.get_dtype(name, device=device)
    except RuntimeError as error:
        raise UserError(f"dtype={name} cannot be used on {device}: use fp16 or fp32") from error
    return dtype
