"""One sequence of tokens: what is run, and that the answer is that of a model without caches."""

import gc
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import nn
from torchtune.modules.peft import disable_adapter

from qst_tune.generation import caches
from qst_tune.generation.sampling import Sampling
from qst_tune.generation.sequence import CachedSequence, continue_sequence
from qst_tune.models import qst_decoder
from qst_tune.models.peqa import peqa_decoder
from qst_tune.modules import nf4_linear, peqa_linear
from qst_tune.modules.side.downsample import DownsampleKind
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

PROMPT = [5, 9, 2, 60, 7]


def qst_model(**side_arguments):
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, **side_arguments)
    randomize_(model.side)
    return model.eval()


def peqa_model():
    return peqa_decoder(tiny_backbone(), bits=4, group_size=32).eval()


@torch.no_grad()
def logits_without_caches(model, tokens):
    return model(torch.tensor([tokens]))[0, -1]


def greedy_without_caches(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(logits_without_caches(model, tokens).argmax().item())
    return tokens[len(prompt) :]


def greedy(model, prompt, count, stop_tokens=()):
    return list(
        continue_sequence(
            CachedSequence(model), prompt, sampling=Sampling(), stop_tokens=stop_tokens,
            max_new_tokens=count,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [qst_model, peqa_model])
@pytest.mark.parametrize("untuned", [False, True])
def test_greedy_tokens_are_those_without_caches(make, untuned) -> None:
    model = make()
    is_qst = make is qst_model
    with disable_adapter(model) if is_qst and untuned else nullcontext():
        assert greedy(model, PROMPT, 20) == greedy_without_caches(model, PROMPT, 20)


@pytest.mark.parametrize("downsample", get_args(DownsampleKind))
def test_logits_token_by_token_are_those_without_caches_for_every_downsampler(downsample) -> None:
    model = qst_model(downsample=downsample)
    sequence, tokens = CachedSequence(model), random_tokens(1, 12)[0].tolist()
    for length in range(4, 12):
        expected = logits_without_caches(model, tokens[:length])
        actual = sequence.next_logits(tokens[:length])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert greedy(model, PROMPT, 12) == greedy_without_caches(model, PROMPT, 12)


def count_tokens(model):
    """Tokens that go into the embedding, from now on."""
    counted = Counter()
    model.tok_embeddings.register_forward_hook(
        lambda module, args, out: counted.update(tokens=args[0].numel())
    )
    return counted


def test_only_new_tokens_are_run() -> None:
    model = qst_model()
    sequence, counted = CachedSequence(model), count_tokens(model)
    for tokens, num_run in [
        ([1, 2, 3, 4], 4),
        ([1, 2, 3, 4, 5, 6], 2),
        ([1, 2, 3, 9], 1),  # changed from the fourth token on
        ([1, 2, 3, 9], 1),  # the last one always, since its logits are asked for
        ([1, 2], 1),
        ([8], 1),
    ]:
        counted.clear()
        actual = sequence.next_logits(tokens)
        assert counted["tokens"] == num_run
        expected = logits_without_caches(model, tokens)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_pass_that_was_broken_off_leaves_no_trace() -> None:
    model = qst_model()
    sequence = CachedSequence(model)
    sequence.next_logits(PROMPT)

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    handle = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sequence.next_logits([*PROMPT, 3, 4])
    handle.remove()
    for tokens in ([*PROMPT, 3, 4], [*PROMPT, 1]):
        expected = logits_without_caches(model, tokens)
        torch.testing.assert_close(sequence.next_logits(tokens), expected, rtol=1e-4, atol=1e-5)


def test_two_sequences_over_one_model_do_not_meet() -> None:
    model = qst_model()
    first, second = CachedSequence(model), CachedSequence(model)
    for length in range(1, 5):
        for sequence, tokens in ((first, [1, 2, 3, 4, 5]), (second, [9, 8, 7, 6, 5])):
            expected = logits_without_caches(model, tokens[:length])
            actual = sequence.next_logits(tokens[:length])
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_it_ends_before_a_stop_token_and_at_the_end_of_the_context() -> None:
    model = qst_model()

    def sampled(prompt, stop_tokens=()):
        torch.manual_seed(0)
        return list(
            continue_sequence(
                CachedSequence(model), prompt, sampling=Sampling(temperature=2.0),
                stop_tokens=stop_tokens, max_new_tokens=20,
            )
        )  # fmt: skip

    tokens = sampled(PROMPT)
    assert len(tokens) == 20
    stop = next(t for t in tokens if tokens.index(t) > 2)
    assert sampled(PROMPT, stop_tokens=[stop]) == tokens[: tokens.index(stop)]
    # The last position's own successor can still be told, but not be run.
    assert len(sampled([1] * (TINY["max_seq_len"] - 2))) == 3


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens are more than the model's max_seq_len 64"):
        CachedSequence(qst_model()).next_logits([1] * 65)


def kept_of(quantization, monkeypatch, caplog, most_bytes=None):
    """Ten tokens; how often a weight was decoded, and what was logged."""
    torch.manual_seed(0)
    model, decoded = qst_model(base_quantization=quantization), Counter()
    for module, name in DECODERS[quantization]:
        decode = getattr(module, name)
        count = lambda *args, decode=decode: decoded.update(["weight"]) or decode(*args)  # noqa: E731
        monkeypatch.setattr(module, name, count)
    if most_bytes is not None:
        monkeypatch.setattr(caches, "MOST_DECODED_BYTES", most_bytes)
    caches._report_decoded.cache_clear()
    caplog.clear()
    with caplog.at_level("INFO"):
        sequence = CachedSequence(model)
        kwargs = {"sampling": Sampling(temperature=0), "stop_tokens": [], "max_new_tokens": 10}
        tokens = list(continue_sequence(sequence, PROMPT, **kwargs))
    return tokens, decoded["weight"], [r.getMessage() for r in caplog.records]


DECODERS = {
    "nf4": [(nf4_linear, "dequantize_nf4"), (nf4_linear, "decoded_rows")],
    "int4": [(peqa_linear, "dequantize_affine")],
}


@pytest.mark.parametrize("quantization", DECODERS)
def test_on_a_cpu_a_text_decodes_each_weight_once_and_says_what_that_takes(
    quantization, monkeypatch, caplog
):
    tokens, decodings, lines = kept_of(quantization, monkeypatch, caplog)
    num_linears = 7 * TINY["num_layers"]
    assert decodings == num_linears
    assert lines == ["decoded weights of 0.001 GiB are kept while text is generated"]
    other, decodings, lines = kept_of(quantization, monkeypatch, caplog, most_bytes=1000)
    assert other == tokens
    assert decodings == 10 * num_linears
    assert lines == []


def test_decoded_weights_go_with_their_text():
    model = qst_model()
    sequence = CachedSequence(model)
    sequence.next_logits(PROMPT)
    ((_, weight), *_) = sequence._caches._decoded.values()
    alive = weakref.ref(weight)
    del weight, _, sequence
    gc.collect()
    assert alive() is None
