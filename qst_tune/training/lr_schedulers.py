"""Learning-rate schedules that fit any length of run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_with_warmup(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    warmup_ratio: float = 0.03,
    num_warmup_steps: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    r"""Raise the learning rate linearly, then lower it along half a cosine.

    Of N steps, W of them to warm up, step t = 1, ..., N has the optimizer's rate times

    .. math::
        \frac{t}{W + 1} \;\; (t \le W), \qquad
        \frac{1}{2}\Big(1 + \cos \pi \frac{t - 1 - W}{N - W}\Big) \;\; (t > W)

    so every step learns. torchtune's ``get_cosine_schedule_with_warmup`` gives step 1 a rate of 0,
    and its warm-up of a fixed number of steps may be longer than the run. W is
    ``num_warmup_steps``, at most N / 2, or else ``warmup_ratio`` N, rounded up.
    """
    if not 0 <= warmup_ratio < 1:
        raise ValueError(f"warmup_ratio={warmup_ratio} must be at least 0 and below 1")
    if num_warmup_steps is not None and num_warmup_steps < 0:
        raise ValueError(f"num_warmup_steps={num_warmup_steps} must be at least 0")
    wanted = math.ceil(warmup_ratio * num_training_steps)
    if num_warmup_steps is not None:
        wanted = min(num_warmup_steps, num_training_steps // 2)
    # A ratio near 1 still leaves the last step at the full rate.
    warmup = min(wanted, num_training_steps - 1)

    def share(done: int) -> float:
        if done < warmup:
            return (done + 1) / (warmup + 1)
        progress = (done - warmup) / (num_training_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, share, last_epoch)
