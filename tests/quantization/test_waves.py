"""Numbers that look like weights, and take none of a run's random numbers."""

import torch

from qst_tune.quantization.waves import waves


def test_values_differ_and_draw_nothing() -> None:
    state = torch.get_rng_state()
    values = waves(40, 50, dtype=torch.float32)
    assert values.shape == (40, 50)
    assert values.unique().numel() > 1900
    assert values.abs().max() <= 1
    assert abs(float(values.mean())) < 0.01
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dtype_rounds_the_same_values() -> None:
    assert torch.equal(waves(7, 9), waves(7, 9, dtype=torch.float32).to(torch.bfloat16))
