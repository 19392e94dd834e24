"""Special tokens of every file of a directory, against transformers' AutoTokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qst_tune.data import hf_chat_tokenizer
from tests.support.chat_directories import CHATML, build_directory

FLAGS = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
TEXT = "hello <|new|> day<|more|> a <extra> b<|im_end|> [PAD]"


def with_files(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = directory / f"{name}.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**before, **content}))
    return directory


def vocabulary_size(directory: Path) -> int:
    return len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]) + 1


def decoder(directory: Path, *tokens: str, special: bool = True) -> dict[str, Any]:
    start = vocabulary_size(directory)
    return {
        str(start + i): {"content": token, "special": special, **FLAGS}
        for i, token in enumerate(tokens)
    }


def variants(directory: Path) -> dict[str, dict[str, Any]]:
    start = vocabulary_size(directory)
    return {
        "added_tokens_decoder": {
            "tokenizer_config": {"added_tokens_decoder": decoder(directory, "<|new|>", "<|more|>")}
        },
        "not special": {
            "tokenizer_config": {
                "added_tokens_decoder": decoder(directory, "<|new|>", special=False)
            }
        },
        "extra": {"tokenizer_config": {"extra_special_tokens": ["<extra>", "<|new|>"]}},
        "additional": {"tokenizer_config": {"additional_special_tokens": ["<extra>"]}},
        "named extra": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<extra>"}}},
        "own name": {"tokenizer_config": {"image_token": "<extra>"}},
        "added_tokens": {"added_tokens": {"<|new|>": start, "[PAD]": start + 1},
                         "special_tokens_map": {"pad_token": "[PAD]"}},
        "map wins": {"special_tokens_map": {"eos_token": "<|endoftext|>", "pad_token": "[PAD]"}},
        "map as dicts": {"special_tokens_map": {"pad_token": {"content": "[PAD]", **FLAGS}}},
        "decoder beside map": {
            "tokenizer_config": {"added_tokens_decoder": decoder(directory, "<|new|>")},
            "special_tokens_map": {"eos_token": "<|endoftext|>"},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["added_tokens_decoder", "not special", "extra", "additional", "named extra", "own name",
     "added_tokens", "map wins", "map as dicts", "decoder beside map"],
)  # fmt: skip
def test_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    directory = build_directory(tmp_path / "m")
    with_files(directory, **variants(directory)[name])
    ours, theirs = hf_chat_tokenizer(str(directory)), AutoTokenizer.from_pretrained(directory)
    assert ours.encode(TEXT, add_eos=False) == theirs(TEXT).input_ids
    ids = (ours.bos_id, ours.eos_id, ours.pad_id)
    assert ids == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    found = ours.encode(TEXT, add_eos=False)
    assert ours.decode(found) == theirs.decode(found, skip_special_tokens=True)


def test_a_conflict_of_two_files_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = build_directory(tmp_path / "m")
    hf_chat_tokenizer(str(with_files(directory, special_tokens_map={"eos_token": "<|endoftext|>"})))
    assert "eos_token is '<|im_end|>' in tokenizer_config.json and '<|endoftext|>'" in caplog.text


def test_an_id_that_a_token_does_not_get_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = build_directory(tmp_path / "m")
    added = {"900": {"content": "<|new|>", "special": True, **FLAGS}}
    hf_chat_tokenizer(str(with_files(directory, tokenizer_config={"added_tokens_decoder": added})))
    number = vocabulary_size(directory)
    assert f"'<|new|>' has the id 900 in added_tokens and {number}" in (caplog.text)


def test_tokens_of_a_template_beside_tokenizer_json_are_one_id_each(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_start|>", "<|new|>").replace("<|im_end|>", "<|more|>")
    directory = build_directory(tmp_path / "m", template)
    added = decoder(directory, "<|new|>", "<|more|>")
    with_files(directory, tokenizer_config={"added_tokens_decoder": added})
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "day"}]
    ours = hf_chat_tokenizer(str(directory))
    theirs = AutoTokenizer.from_pretrained(directory)
    tokens, _ = ours.tokenize_conversation(messages)
    assert tokens == theirs.apply_chat_template(messages, return_dict=False)
    assert ours.stop_tokens == [ours.eos_id, vocabulary_size(directory) + 1]
