"""Kernels that differ from the tables, or do not compile, are not used, and that is logged."""

import logging

import pytest
import torch

from qst_tune.quantization.kernels import passes_trial

pytest.importorskip("triton")


@pytest.fixture
def products(monkeypatch, triton_device):
    """The interpreter multiplies several tokens in bf16 wrongly: let the tables do it there."""
    if triton_device == "cuda":
        return triton_device
    from qst_tune.quantization import triton_products
    from qst_tune.quantization.nf4 import dequantize_nf4

    own = triton_products.nf4_product

    def product(x, weight, absmax=None):
        return own(x, weight, absmax) if len(x) == 1 else x @ dequantize_nf4(weight).T

    monkeypatch.setattr(triton_products, "nf4_product", product)
    return triton_device


def test_our_kernels_pass(products):
    state = torch.get_rng_state()
    assert passes_trial(products)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", ["decode_nf4", "decode_affine"])
def test_one_value_that_differs_is_found_and_logged(kernel, products, monkeypatch, caplog):
    from qst_tune.quantization import triton_decoding

    own = getattr(triton_decoding, kernel)

    def wrong(*args):
        weight = own(*args)
        weight[3, 5] += 0.01
        return weight

    monkeypatch.setattr(triton_decoding, kernel, wrong)
    with caplog.at_level(logging.WARNING):
        assert not passes_trial(products)
    assert "are decoded to other values" in caplog.text


def test_a_kernel_that_does_not_compile_is_one_line(products, monkeypatch, caplog):
    from qst_tune.quantization import triton_products

    def fail(*args):
        raise RuntimeError("ptxas failed\nand much more")

    monkeypatch.setattr(triton_products, "affine_product", fail)
    with caplog.at_level(logging.WARNING):
        assert not passes_trial(products)
    assert "ptxas failed" in caplog.text
    assert "much more" not in caplog.text
