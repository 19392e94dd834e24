"""A batch of prompts: each answer is that of the prompt alone, without caches and padding."""

import pytest
import torch

from qst_tune.generation.batch import answer_batch
from qst_tune.generation.sampling import Sampling
from tests.generation.test_sequence import (
    PROMPT,
    greedy_without_caches,
    peqa_model,
    qst_model,
)

PROMPTS = [PROMPT, [3], [8, 1, 1, 40, 22, 7, 9, 30]]


def greedy(model, prompts, count, stop_tokens=()):
    return answer_batch(
        model, prompts, sampling=Sampling(), stop_tokens=stop_tokens, max_new_tokens=count
    )


@pytest.mark.parametrize("make", [qst_model, peqa_model])
def test_each_row_gets_the_answer_it_gets_alone_without_caches(make) -> None:
    model = make()
    expected = [greedy_without_caches(model, prompt, 9) for prompt in PROMPTS]
    assert greedy(model, PROMPTS, 9) == expected


def test_each_row_ends_before_its_own_stop_token() -> None:
    model = qst_model()
    whole = greedy(model, PROMPTS, 9)
    stop = [whole[0][2], whole[2][5]]
    expected = [
        row[: min([row.index(token) for token in stop if token in row], default=9)] for row in whole
    ]
    assert greedy(model, PROMPTS, 9, stop) == expected
    assert len({len(row) for row in expected}) > 1


def test_the_last_position_of_the_model_can_be_used() -> None:
    model = qst_model()
    prompt = [1] * (model.max_seq_len - 3)
    assert greedy(model, [prompt, [2]], 3)[0] == greedy_without_caches(model, prompt, 3)


def test_draws_are_among_the_tokens_that_top_p_keeps() -> None:
    """So small a share leaves the likeliest token alone, at any temperature."""
    model = qst_model()
    torch.manual_seed(1)
    drawn = answer_batch(
        model, PROMPTS, sampling=Sampling(5.0, top_p=1e-6), stop_tokens=(), max_new_tokens=5
    )
    assert drawn == greedy(model, PROMPTS, 5)
