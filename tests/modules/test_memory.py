"""Bytes counted by the code against bytes counted by hand."""

import pytest
import torch
from torch import nn

from qst_tune.modules.memory import (
    count_saved_activations,
    optimizer_bytes,
    parameter_bytes,
    peak_memory_bytes,
)
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.quantization.table import quantize_table


def test_parameters_and_buffers_count_by_their_dtype() -> None:
    module = nn.Linear(10, 4)
    module.register_buffer("buffer", torch.zeros(3, dtype=torch.bfloat16))
    assert parameter_bytes(module) == 4 * (10 * 4 + 4) + 2 * 3


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(10, 4, bias=False), nn.Linear(10, 4, bias=False)
    second.weight = first.weight
    assert parameter_bytes(nn.ModuleList([first, second])) == 4 * 10 * 4


def test_nf4_weight_counts_its_codes_scales_and_levels() -> None:
    linear = NF4Linear(torch.randn(64, 128, dtype=torch.bfloat16))
    num_blocks = 64 * 128 // 64
    num_scaler_blocks = 1  # 128 blocks, fewer than 256
    codes, scalers = 64 * 128 // 2, num_blocks
    levels, mean = 16 * 2, 2
    assert parameter_bytes(linear) == codes + scalers + num_scaler_blocks * 2 + mean + levels


def test_a_quantised_embedding_counts_its_codes_and_a_scale_a_row() -> None:
    embedding = nn.Embedding(10, 64)
    embedding.weight = nn.Parameter(quantize_table(embedding.weight), requires_grad=False)
    assert parameter_bytes(embedding) == 10 * 64 + 10 * 4


def test_optimizer_state_is_two_moments_and_a_step() -> None:
    module = nn.Linear(10, 4, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    assert optimizer_bytes(optimizer) == 0
    module(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert optimizer_bytes(optimizer) == 2 * 4 * 40 + 4


def test_saved_activations_are_what_backward_needs() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(5, 8)
    with count_saved_activations(module) as kept:
        module(x)
    # The input of the first linear, and the output of ReLU, which the second linear shares.
    assert kept.num_bytes == 4 * (5 * 8 + 5 * 16)


def test_nothing_is_kept_without_gradients() -> None:
    module = nn.Linear(8, 16)
    with torch.no_grad(), count_saved_activations(module) as kept:
        module(torch.randn(5, 8))
    assert kept.num_bytes == 0


def test_counting_does_not_change_gradients() -> None:
    module, x = nn.Linear(8, 16), torch.randn(5, 8)
    module(x).square().sum().backward()
    expected = module.weight.grad.clone()
    module.zero_grad()
    with count_saved_activations(module):
        loss = module(x).square().sum()
    loss.backward()
    torch.testing.assert_close(module.weight.grad, expected, rtol=0, atol=0)


def test_peak_of_this_process_is_bytes_and_never_falls() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert before > 50 * 1024**2  # torch alone takes more
    block = torch.ones(2**26)  # 256 MiB
    after = peak_memory_bytes(torch.device("cpu"))
    del block
    assert after >= before
    assert peak_memory_bytes(torch.device("cpu")) >= after


@pytest.mark.gpu
def test_peak_on_a_gpu_is_the_allocators() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda.reset_peak_memory_stats()
    block = torch.ones(2**20, device="cuda")
    assert peak_memory_bytes(torch.device("cuda")) >= block.nbytes
