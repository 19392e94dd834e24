"""Tokenizers of directories of many kinds, against transformers' AutoTokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from qst_tune.data import hf_chat_tokenizer
from qst_tune.errors import UserError
from tests.support.chat_directories import CHATML, build_directory

TEXT = "hello, good day <|im_end|> a"


def with_post_processor(directory: Path, single: str) -> Path:
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = [(token, raw.token_to_id(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    raw.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize(
    ("single", "begins"),
    [
        ("<|endoftext|> $A", True),
        ("<|endoftext|> $A <|im_end|>", True),
        ("$A <|im_end|>", False),
        ("$A", False),
    ],
    ids=["bos", "bos and eos", "eos", "none"],
)
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_plain_text_begins_as_the_post_processor_says(
    tmp_path: Path, single: str, begins: bool, add_bos_token: bool | None
) -> None:
    directory = with_post_processor(
        build_directory(tmp_path / "m", add_bos_token=add_bos_token), single
    )
    tokenizer = hf_chat_tokenizer(str(directory))
    theirs = AutoTokenizer.from_pretrained(directory)(TEXT).input_ids
    if theirs[-1] == tokenizer.eos_id:
        theirs = theirs[:-1]
    found = tokenizer.encode(TEXT, add_eos=False)
    assert found == theirs
    assert (found[0] == tokenizer.bos_id) == begins
    assert tokenizer.encode(TEXT) == [*theirs, tokenizer.eos_id]
    assert tokenizer.encode(TEXT, add_bos=False, add_eos=False) == theirs[begins:]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast"])
def test_tokens_of_other_classes_equal_transformers(tmp_path: Path, name: str) -> None:
    directory = build_directory(tmp_path / "m", tokenizer_class=name)
    tokenizer, theirs = hf_chat_tokenizer(str(directory)), AutoTokenizer.from_pretrained(directory)
    found = tokenizer.encode(TEXT, add_eos=False)
    assert found == theirs(TEXT).input_ids
    assert tokenizer.decode(found, skip_special_tokens=False) == theirs.decode(found)


def test_code_of_a_directory_is_not_run(tmp_path: Path) -> None:
    directory = build_directory(
        tmp_path / "m",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    (directory / "own.py").write_text("raise SystemExit('run')")
    plain = hf_chat_tokenizer(str(build_directory(tmp_path / "plain")))
    assert hf_chat_tokenizer(str(directory)).encode(TEXT) == plain.encode(TEXT)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and transformers"):
        hf_chat_tokenizer(str(directory))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    directory = build_directory(tmp_path / "m")
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=name):
        hf_chat_tokenizer(str(directory))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_transformers_empty_vocabulary_is_refused(
    tmp_path: Path, name: str, model_type: str
) -> None:
    directory = build_directory(tmp_path / "m", tokenizer_class=name)
    (directory / "tokenizer.json").unlink()
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        UserError, match=r"has no tokenizer\.json(, and transformers| and no other vocabulary)"
    ):
        hf_chat_tokenizer(str(directory))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and transformers"):
        hf_chat_tokenizer(str(tmp_path))


PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def build_opt_directory(directory: Path) -> Path:
    """As OPT is published: vocab.json and merges.txt, no tokenizer.json, no chat template."""
    directory.mkdir()
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    raw.train_from_iterator(["hello good day to you all, good day"], trainer)
    raw.model.save(str(directory))
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    (directory / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return directory


def test_opts_directory_and_a_template_of_the_config_give_transformers_tokens(
    tmp_path: Path,
) -> None:
    directory = build_opt_directory(tmp_path / "opt")
    tokenizer = hf_chat_tokenizer(str(directory), chat_template=PLAIN)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 1)
    prompt, answer = "hello, good day\n", "to you all</s> "
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    tokens, mask = tokenizer.tokenize_conversation(messages)
    theirs = AutoTokenizer.from_pretrained(directory)
    expected = theirs(prompt + answer)["input_ids"]
    assert expected[0] == 2  # OPT begins every text with </s>
    assert tokens == [*expected, 2]
    learnt = [token for token, is_masked in zip(tokens, mask, strict=True) if not is_masked]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == answer + "</s>"


FLAGS = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
SPECIAL_TEXT = "hello <|new|> day<|more|> a <extra> b<|im_end|> [PAD]"


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
    assert ours.encode(SPECIAL_TEXT, add_eos=False) == theirs(SPECIAL_TEXT).input_ids
    ids = (ours.bos_id, ours.eos_id, ours.pad_id)
    assert ids == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    found = ours.encode(SPECIAL_TEXT, add_eos=False)
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "generation_config",
            {"eos_token_id": {}},
            "json: eos_token_id is {}: it",
        ),
        (
            "generation_config",
            {"eos_token_id": [2, "a"]},
            r"eos_token_id is \[2, 'a'\]: it",
        ),
        (
            "generation_config",
            {"eos_token_id": True},
            "eos_token_id is True: it must",
        ),
        (
            "tokenizer_config",
            {"chat_template": 3},
            r"template is a number \(3\): it",
        ),
        ("tokenizer_config", {"chat_template": {"default": 1}}, "chat_template is a dict"),
        ("tokenizer", {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "no other vocabulary"),
    ],
)
def test_values_of_another_type_are_named(
    tmp_path: Path, name: str, content: dict[str, Any], message: str
) -> None:
    directory = with_files(build_directory(tmp_path / "m"), **{name: content})
    with pytest.raises(UserError, match=message):
        hf_chat_tokenizer(str(directory))


def test_a_panic_of_the_tokenizer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):  # as pyo3's, which is no Exception
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("slice index starts at 2")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", panic)
    with pytest.raises(UserError, match=r"needs code of its own: slice index starts at 2"):
        hf_chat_tokenizer(str(build_directory(tmp_path / "m")))


def test_half_a_character_in_a_conversation_is_one_line(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "m")))
    with pytest.raises(UserError, match="half a character"):
        tokenizer.tokenize_conversation([{"role": "user", "content": "a \ud800"}])
    with pytest.raises(UserError, match="half a character"):
        tokenizer.encode("\udfff")
