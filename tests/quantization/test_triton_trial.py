"""Kernels that differ from the tables, or do not compile, are not used, and that is logged."""

import logging

import pytest
import torch

from qst_tune.quantization.kernels import passes_trial

pytest.importorskip("triton")


def test_our_kernels_pass(triton_device):
    state = torch.get_rng_state()
    assert passes_trial(triton_device)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", ["decode_nf4", "decode_affine"])
def test_one_value_that_differs_is_found_and_logged(kernel, triton_device, monkeypatch, caplog):
    from qst_tune.quantization import triton_decoding

    own = getattr(triton_decoding, kernel)

    def wrong(*args):
        weight = own(*args)
        weight[3, 5] += 0.01
        return weight

    monkeypatch.setattr(triton_decoding, kernel, wrong)
    with caplog.at_level(logging.WARNING):
        assert not passes_trial(triton_device)
    assert "are decoded to other values" in caplog.text


def test_a_kernel_that_does_not_compile_is_one_line(triton_device, monkeypatch, caplog):
    from qst_tune.quantization import triton_decoding

    def fail(*args):
        raise RuntimeError("ptxas failed\nand much more")

    monkeypatch.setattr(triton_decoding, "decode_affine", fail)
    with caplog.at_level(logging.WARNING):
        assert not passes_trial(triton_device)
    assert "ptxas failed" in caplog.text
    assert "much more" not in caplog.text
