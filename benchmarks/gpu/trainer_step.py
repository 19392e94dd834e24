"""The training step of transformers' Trainer, which PEFT's and Unsloth's models take.

torch is imported when it is called: Unsloth must be imported before.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.turns import Step
    from benchmarks.methods import Batch


def trainer_step(
    model: Any, active: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> "Step":
    """Take steps in bf16 autocast with AdamW and clipping, forward and backward in ``active``."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(batch: "Batch") -> float:
        tokens = batch["tokens"]
        model.train()
        with active():
            with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
