"""What stands in for CUDA's kernels allocates what they do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qst_tune.estimation.fake_device import allocate_fake, device_kernels, fake_tensors
from qst_tune.estimation.tracker import StorageTracker
from qst_tune.quantization.table import quantize_table

SHAPE = (2, 8, 64)
TOKENS, BYTES = 16, 2 * 8 * 64 * 4


def step_bytes(weight, *, dtype=torch.float32, device="cuda"):
    """At the end of forward and at the peak, above what was there before."""
    x = torch.ones(SHAPE, dtype=dtype).requires_grad_()
    with device_kernels(device), StorageTracker() as tracker:
        tracker.register([x, weight], "frozen weights")
        tracker.enter("forward")
        y = F.rms_norm(x, SHAPE[-1:], weight, 1e-6)
        tracker.enter("backward")
        y.backward(y)
    memory = tracker.peak()
    return memory.saved_bytes, memory.num_bytes - memory.start_bytes


@pytest.mark.parametrize("with_weight", [True, False])
def test_a_fused_rms_norm_allocates_its_result_and_one_number_a_token(with_weight):
    """With and without a weight: torch gives both to the same kernel."""
    weight = torch.ones(SHAPE[-1]) if with_weight else None
    saved, peak = step_bytes(weight)
    assert saved == BYTES + 4 * TOKENS
    assert peak == saved + BYTES  # and the gradient of its input


def test_a_weight_of_another_dtype_is_not_fused():
    weight = torch.ones(SHAPE[-1])
    saved, _ = step_bytes(weight, dtype=torch.bfloat16)
    assert saved > BYTES // 2 + 2 * TOKENS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_quantised_head_decodes_as_many_rows_at_once_as_it_will_on_the_device(device):
    """By the largest dense part of a head of 80 thousand rows: 2^22, or all 5 million weights."""
    with torch.device("meta"):
        table = quantize_table(torch.empty(80_000, 64))
    head = nn.Linear(64, 80_000, bias=False, device="meta")
    head.weight = nn.Parameter(table, requires_grad=False)
    with fake_tensors(torch.float32):
        allocate_fake(head, device)
        with device_kernels(device), StorageTracker() as tracker:
            tracker.register(head.weight, "frozen weights")
            tracker.enter("forward")
            head(torch.ones(1, 64))
    at_once = {"cpu": 2**22, "cuda": 80_000 * 64}[device]
    logits = 80_000 * 4
    memory = tracker.peak()
    assert 4 * at_once < memory.num_bytes - memory.start_bytes < 4 * at_once + 4 * logits
