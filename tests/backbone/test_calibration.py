"""The text is the same for everyone, and a model reads it by its own tokenizer."""

import hashlib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from qst_tune.backbone.calibration import calibration_text, calibration_tokens, text_id
from qst_tune.errors import UserError
from tests.support.checkpoints import write_chat_tokenizer

# Results name it: another text is another backbone.
SHA256 = "a511eaaf"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_chat_tokenizer(tmp_path)
    return tmp_path


def test_a_changed_text_is_noticed() -> None:
    assert hashlib.sha256(calibration_text().encode()).hexdigest()[:8] == text_id() == SHA256


@pytest.mark.parametrize(
    ("longest", "shape"), [(4096, (8, 256)), (128, (16, 128)), (100, (20, 100))]
)
def test_rows_are_full_and_no_longer_than_the_model_allows(
    longest: int, shape: tuple[int, int], directory: Path
) -> None:
    tokens = calibration_tokens(directory, 300, longest)
    assert tokens.shape == shape
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(calibration_text()).ids
    assert tokens.flatten().tolist() == ids[: tokens.numel()]


def test_settings_of_whoever_saved_the_tokenizer_do_not_count(directory: Path) -> None:
    expected = calibration_tokens(directory, 300, 256)
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(7)
    tokenizer.save(path)
    assert torch.equal(calibration_tokens(directory, 300, 256), expected)


def test_a_directory_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.repair_rank runs a text .* no tokenizer") as error:
        calibration_tokens(tmp_path, 300, 256)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"no tokenizer that can be read") as error:
        calibration_tokens(tmp_path, 300, 256)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(directory: Path) -> None:
    with pytest.raises(UserError, match=r"has the token \d+, and the model only 100"):
        calibration_tokens(directory, 100, 256)
