"""The fastest way with the known result is taken."""

import logging

import pytest
import torch

from qst_tune.quantization import fastest as module
from qst_tune.quantization.fastest import fastest

RIGHT = torch.tensor([1.0, -2.0, 3.0])


class Way:
    def __init__(self, milliseconds, result=RIGHT):
        self.milliseconds, self.result = milliseconds, result

    def __call__(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(module, "_milliseconds", lambda compute, device: compute.milliseconds)


@pytest.mark.parametrize(
    ("others", "expected"),
    [([3, 2, 4], 1), ([5, 6], None), ([5, 4.9], 1), ([], None)],
)
def test_the_fastest_is_taken_if_it_is_faster_than_the_known_way(others, expected):
    assert fastest(Way(5), [Way(ms) for ms in others]) == expected


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (RIGHT * 1.03, "its results differ by 0.03 of their size"),
        (RIGHT * torch.nan, "its results differ by nan of their size"),
        (ValueError("PTX is\nwrong"), "ValueError: PTX is"),
    ],
)
def test_a_wrong_way_is_reported_and_not_taken(result, reason, caplog):
    with caplog.at_level(logging.WARNING):
        assert fastest(Way(5), [Way(1, result), Way(2)]) == 1
    assert reason in caplog.text


def test_a_fault_that_many_kernels_have_is_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert fastest(Way(5), [Way(1, AttributeError("no gather"))] * 2) is None
    assert len(caplog.records) == 1


def test_what_cannot_be_timed_leaves_the_known_way(monkeypatch, caplog):
    def refuse(compute, device):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(module, "_milliseconds", refuse)
    with caplog.at_level(logging.WARNING):
        assert fastest(Way(5), [Way(1)]) is None
    assert "cannot be timed here: no graphs here" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_without_the_time_of_python(monkeypatch):
    monkeypatch.undo()
    small = torch.randn(64, 64, device="cuda")
    large = torch.randn(4096, 4096, device="cuda")

    def product(matrix):
        return lambda: matrix @ matrix

    device, _ = torch.device("cuda"), (small @ small, large @ large)
    assert module._milliseconds(product(small), device) < 0.05
    assert module._milliseconds(product(large), device) > 0.5
