"""Every clone checks the equations against fixed numbers, which ``make.py`` wrote once."""

import pytest
import torch
from safetensors.torch import load_file

from qst_tune.modules.side.config import VARIANTS
from tests.golden.make import HERE, build, loss_of, transcribed

# fp32 against fp64; the largest measured difference is 1.2e-5, of logits as large as 4.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def part(tensors, prefix):
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


@pytest.fixture(params=VARIANTS)
def golden(request):
    tensors = load_file(HERE / f"{request.param}.safetensors")
    model = build(request.param)
    model.load_state_dict(part(tensors, "weight."))
    return model, tensors


def assert_equal(logits, gradients, tensors):
    expected = part(tensors, "gradient.") | {"logits": tensors["logits"]}
    computed = {**gradients, "logits": logits}
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            computed[name].float(), value, msg=lambda m, n=name: f"{n}: {m}", **CLOSE
        )


def test_logits_and_all_gradients_are_the_fixed_ones(golden):
    model, tensors = golden
    logits = model(tensors["tokens"])
    loss_of(logits, tensors["tokens"]).backward()
    gradients = {name: parameter.grad for name, parameter in model.side.named_parameters()}
    assert_equal(logits, gradients, tensors)


def test_the_transcription_still_gives_the_fixed_numbers(golden):
    model, tensors = golden
    assert_equal(*transcribed(model, tensors["tokens"]), tensors)
