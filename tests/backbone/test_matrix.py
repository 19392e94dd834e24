"""What a side network can do over each model type of transformers, with tiny random weights.

A few types run by default, all with ``-m slow``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import logging

from qst_tune.backbone.loading import load_transformers_backbone
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.generation.batch import answer_batch
from qst_tune.generation.sampling import Sampling
from qst_tune.generation.sequence import CachedSequence
from qst_tune.models import qst_decoder, qst_from_hf
from tests.support.model_types import (
    CANNOT_GENERATE,
    CANNOT_PACK,
    TYPES,
    tiny_model,
    tokens_of,
    two_samples,
)
from tests.support.numbers import losses_of_steps, randomize_

# Of fp32 on a CPU; the right ones differ by 5e-7 at most, Gemma 4's by 5e-6.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
CPU = torch.device("cpu")

SAMPLE = ("gemma3_text", "gpt_oss", "qwen3_moe", "qwen3_5_text", "llama4_text")
by_type = pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in TYPES],
)


@pytest.fixture(autouse=True)
def _quiet():
    logging.set_verbosity_error()


def model_of(model_type: str, *, tuned: bool = False) -> tuple[Any, Any]:
    """A side network that does something, or nothing yet, and the model under it."""
    theirs = tiny_model(model_type)
    model = qst_decoder(
        TransformersBackbone(theirs),
        reduction_factor=4,
        num_side_blocks=2,
        base_quantization="none",
    )
    if tuned:
        randomize_(model.side)
    return model.eval(), theirs


@by_type
@torch.no_grad()
def test_logits_at_the_start_are_transformers_own(model_type: str) -> None:
    """Rows of 24 tokens, longer than the sliding windows."""
    model, theirs = model_of(model_type)
    tokens = tokens_of(24)
    expected = theirs(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens), expected, **TOLERANCE)


@by_type
def test_training_lowers_the_loss_and_leaves_the_model_alone(model_type: str) -> None:
    model, theirs = model_of(model_type)
    before = {name: p.clone() for name, p in theirs.named_parameters()}
    tokens = tokens_of(24)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    losses = losses_of_steps(loss, model.side.parameters(), lr=1e-2)
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad is None for p in theirs.parameters())
    assert all(torch.equal(p, before[name]) for name, p in theirs.named_parameters())


@by_type
@torch.no_grad()
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(model_type: str) -> None:
    model, _ = model_of(model_type, tuned=True)
    tokens = tokens_of(20)
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1, :7] = False
    together = model(tokens * padding, mask=padding)
    torch.testing.assert_close(together[1:, 7:], model(tokens[1:, 7:]), **TOLERANCE)
    torch.testing.assert_close(together[:1], model(tokens[:1]), **TOLERANCE)


@by_type
@torch.no_grad()
def test_packed_samples_give_what_they_give_alone_or_are_refused(model_type: str) -> None:
    model, _ = model_of(model_type, tuned=True)
    first, second, packed = two_samples()
    tokens = torch.cat([first, second], dim=1)
    if model_type in CANNOT_PACK:
        with pytest.raises(UserError, match=CANNOT_PACK[model_type]):
            model(tokens, **packed)
        return
    expected = torch.cat([model(first), model(second)], dim=1)
    torch.testing.assert_close(model(tokens, **packed), expected, **TOLERANCE)


@by_type
@torch.no_grad()
def test_caches_give_what_whole_rows_give(model_type: str) -> None:
    """On a row that grows by one and by many, past the windows, and is changed in the middle."""
    model, _ = model_of(model_type, tuned=True)
    if model_type in CANNOT_GENERATE:
        with pytest.raises(UserError, match=CANNOT_GENERATE[model_type]):
            CachedSequence(model)
        return
    tokens = tokens_of(40, 1)[0].tolist()
    expected = model(torch.tensor([tokens]))[0]
    sequence = CachedSequence(model)
    for length in (20, 21, 22, 40, 30, 31):
        logits = sequence.next_logits(tokens[:length])
        torch.testing.assert_close(logits, expected[length - 1], **TOLERANCE)


@by_type
@torch.no_grad()
def test_a_batch_of_prompts_gets_the_answers_of_each_alone(model_type: str) -> None:
    if model_type in CANNOT_GENERATE:
        pytest.skip(CANNOT_GENERATE[model_type])
    model, _ = model_of(model_type, tuned=True)
    tokens = tokens_of(40, 1)[0].tolist()
    prompts = [tokens[:20], tokens[5:12], tokens[30:]]
    expected = [_answer_without_cache(model, prompt, 4) for prompt in prompts]
    greedy = Sampling()
    answers = answer_batch(model, prompts, sampling=greedy, stop_tokens=[], max_new_tokens=4)
    assert answers == expected


def _answer_without_cache(model: Any, prompt: list[int], count: int) -> list[int]:
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(model(torch.tensor([prompt + answer]))[0, -1].argmax()))
    return answer


@by_type
@torch.no_grad()
@pytest.mark.parametrize("form", ["none", "nf4"])
def test_a_saved_model_is_loaded_as_it_was(model_type: str, form: str, tmp_path: Path) -> None:
    """In NF4 the same as the model that is quantised in memory, to the last bit."""
    theirs = tiny_model(model_type)
    theirs.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"reduction_factor": 4, "base_quantization": form}
    with torch.device("meta"):
        model = qst_from_hf(str(tmp_path), **settings)
    load_transformers_backbone(model.backbone, tmp_path, dtype=torch.float32, device=CPU)
    model.initialize_side(CPU)
    expected = qst_decoder(TransformersBackbone(theirs), **settings)
    tokens = tokens_of(24)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.backbone.quantization == expected.backbone.quantization
    assert torch.equal(model(tokens), expected(tokens))


def test_at_least_45_types_are_tried() -> None:
    assert len(set(TYPES)) == len(TYPES) >= 45
