"""What stands in for CUDA's kernels allocates what they do."""

import pytest
import torch
import torch.nn.functional as F

from qst_tune.estimation.fake_device import allocate_fake, device_kernels, fake_tensors
from qst_tune.estimation.tracker import StorageTracker
from qst_tune.models import qst_decoder
from tests.helpers import tiny_backbone

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


def test_a_quantised_embedding_says_that_it_is_on_the_device():
    """By which it chooses how many rows to decode at once; its parts are fake ones on the CPU."""
    with torch.device("meta"):
        model = qst_decoder(
            tiny_backbone(tied=True), reduction_factor=4, embedding_quantization="int8"
        )
    with fake_tensors(torch.float32):
        allocate_fake(model, "cuda")
        table = model.tok_embeddings.weight
        assert table.device.type == "cuda"
        assert table.codes.device.type == "cpu"
        assert F.embedding(torch.tensor([[1, 2]]), table).shape == (1, 2, 96)
    assert model.output.tied_module.weight is table
