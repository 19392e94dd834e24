"""How tokens are drawn, against transformers' own filters and the softmax."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qst_tune.config.schema import GenerationConfig
from qst_tune.generation.sampling import Sampling
from tests.support.configs import typed_config


@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_filtered_logits_are_those_of_transformers(
    temperature: float, top_p: float | None, top_k: int | None
) -> None:
    logits = 3 * torch.randn(40, 211)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    actual = Sampling(temperature, top_k, top_p).filtered(logits)
    assert torch.equal(actual, expected)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    kept = {
        top_p: Sampling(1.0, None, top_p).filtered(logits).isfinite()[0].tolist()
        for top_p in (0.01, 0.49, 0.51, 0.74, 0.76, 0.95)
    }
    assert kept[0.01] == kept[0.49] == [False, True, False, False]
    assert kept[0.51] == kept[0.74] == [False, True, False, True]
    assert kept[0.76] == [False, True, True, True]
    assert kept[0.95] == [True, True, True, True]


@pytest.mark.parametrize("sampling", [Sampling(2.0, top_k=3), Sampling(2.0, top_p=0.85)])
def test_draws_follow_the_softmax_of_what_is_kept(sampling: Sampling) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = sampling.choose(logits.expand(4000, 4))
    expected = (logits[:3] / 2).softmax(0)
    actual = draws.bincount(minlength=4) / 4000
    assert actual[3] == 0
    # Four standard deviations of a share of 4000 draws.
    torch.testing.assert_close(actual[:3], expected, rtol=0, atol=4 * (0.25 / 4000) ** 0.5)


def test_without_a_temperature_it_is_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 1.0, 2.0, -1.0]])
    assert Sampling(0.0, top_k=2, top_p=0.1).choose(logits).tolist() == [2, 0]


def test_a_config_without_a_setting_or_with_null_takes_its_default() -> None:
    assert Sampling.of_config(typed_config({"top_k": 3, "seed": 1}, GenerationConfig)) == Sampling(
        0.0, 3, None
    )
    given = typed_config({"temperature": "0.5", "top_k": None, "top_p": 0.25}, GenerationConfig)
    assert Sampling.of_config(given) == Sampling(0.5, None, 0.25)


def test_a_temperature_near_zero_does_not_overflow() -> None:
    logits = torch.tensor([[1e4, 2e4, 2e4 - 1]])
    assert Sampling(temperature=1e-300).choose(logits).tolist() == [1]
