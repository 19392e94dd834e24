"""Scores equal the literal sums, whatever the batch, the padding and the order."""

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.evaluation.log_likelihood import Continuation, log_likelihood_passes
from qst_tune.generation.sequence import CachedSequence
from qst_tune.models import qst_decoder
from qst_tune.models.peqa import peqa_decoder
from qst_tune.training.task import complete
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone


def qst_model():
    model = qst_decoder(tiny_backbone(tied=True), reduction_factor=TINY_REDUCTION)
    randomize_(model.side)
    return model.eval()


def peqa_model():
    return peqa_decoder(tiny_backbone(), bits=4, group_size=32).eval()


def continuations():
    """Of different lengths; some share their context, and some a row."""
    tokens = random_tokens(1, 40)[0].tolist()
    made = [Continuation(tuple(tokens[:n]), tuple(tokens[n : n + m])) for n, m in
            ((5, 3), (9, 1), (20, 12), (1, 30), (2, 2))]  # fmt: skip
    return [*made, *(Continuation(tuple(tokens[:9]), (token,)) for token in (3, 4, 5))]


@torch.no_grad()
def literal(model, continuation):
    tokens = torch.tensor([continuation.context + continuation.target])
    log_probs = model(tokens)[0].double().log_softmax(-1)
    start = len(continuation.context) - 1
    return sum(log_probs[start + i, t].item() for i, t in enumerate(continuation.target))


@pytest.mark.parametrize("make", [qst_model, peqa_model])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_equal_the_literal_sums(make, batch_size) -> None:
    model, asked = make(), continuations()
    found = complete(log_likelihood_passes(model, asked, batch_size=batch_size))
    expected = [literal(model, continuation) for continuation in asked]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_the_head_in_parts_gives_the_same(monkeypatch) -> None:
    model, asked = qst_model(), continuations()
    whole = complete(log_likelihood_passes(model, asked, batch_size=4))
    monkeypatch.setattr("qst_tune.evaluation.log_likelihood._LOGITS_AT_ONCE", 5)
    parts = complete(log_likelihood_passes(model, asked, batch_size=4))
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole))


def test_a_row_that_answers_share_is_run_once() -> None:
    model, rows = qst_model(), []
    model.tok_embeddings.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    complete(log_likelihood_passes(model, continuations(), batch_size=100))
    assert rows == [5]  # 8 continuations, of which 4 are one token behind the same 9


def test_a_text_that_is_too_long_is_reported() -> None:
    too_long = Continuation(tuple([1] * TINY["max_seq_len"]), (1, 2))
    with pytest.raises(UserError, match="65 tokens is longer than the model's max_seq_len 64"):
        complete(log_likelihood_passes(qst_model(), [too_long], batch_size=1))


def test_model_that_overflows_is_refused() -> None:
    model = tiny_backbone(dtype=torch.float16)
    for linear in (model.layers[1].mlp.w1, model.layers[1].mlp.w2, model.layers[1].mlp.w3):
        linear.weight.data.normal_(std=1e3)
    model = peqa_decoder(model, bits=8).eval()
    with pytest.raises(UserError, match=r"^log probabilities of the model are not finite; dtype=f"):
        complete(log_likelihood_passes(model, [Continuation((1, 2), (3,))], batch_size=1))
    with pytest.raises(UserError, match=r"^logits of the model are not finite; dtype=fp16"):
        CachedSequence(model).next_logits([1, 2])
