"""Every token but the first is predicted once, from what its window says."""

import math

import pytest
import torch

from qst_tune.data import hf_chat_tokenizer
from qst_tune.errors import UserError
from qst_tune.evaluation.perplexity import TextScore, read_text, text_passes, text_windows
from qst_tune.training.task import complete
from tests.evaluation.test_log_likelihood import qst_model
from tests.support.checkpoints import write_chat_tokenizer
from tests.support.numbers import random_tokens


@pytest.mark.parametrize("length", [2, 10, 11, 12, 37])
def test_windows_predict_each_token_once(length) -> None:
    tokens = list(range(length))
    windows = text_windows(tokens, 10)
    predicted = [token for window in windows for token in window.target]
    assert predicted == tokens[1:]
    assert all(len(window.row) <= 10 for window in windows)
    assert all(window.context == (window.target[0] - 1,) for window in windows)


@torch.no_grad()
def test_a_text_of_one_window_has_the_perplexity_of_its_mean_loss() -> None:
    model, tokens = qst_model(), random_tokens(1, 40)
    logits = model(tokens[:, :-1])[0]
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()
    for batch_size in (1, 5):
        how = {"window": 50, "batch_size": batch_size}
        score = complete(text_passes(model, tokens[0].tolist(), 100, **how))
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert score.num_tokens == 39
    assert score.bits_per_byte == pytest.approx(39 * loss / math.log(2) / 100, rel=1e-5)


def test_units() -> None:
    score = TextScore(nats=8 * math.log(2), num_tokens=4, num_bytes=16)
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)


def test_a_file_is_read_as_far_as_asked(tmp_path) -> None:
    write_chat_tokenizer(tmp_path)
    tokenizer = hf_chat_tokenizer(str(tmp_path))
    file = tmp_path / "text.txt"
    file.write_text("what is the colour of box\n" * 3, encoding="utf-8")
    tokens, num_bytes = read_text(file, tokenizer)
    assert num_bytes == len(file.read_bytes())
    some, some_bytes = read_text(file, tokenizer, 4)
    assert some == tokens[:4]
    assert some_bytes == len(tokenizer.decode(some).encode()) < num_bytes
    (tmp_path / "empty.txt").write_text("")
    for name, reason in (("empty.txt", "is too short"), ("absent.txt", "cannot be read")):
        with pytest.raises(UserError, match=reason):
            read_text(tmp_path / name, tokenizer)


def test_a_loss_beyond_all_numbers_is_infinite_perplexity() -> None:
    assert TextScore(1e6, 10, 40).perplexity == math.inf
