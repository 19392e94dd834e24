"""Chat templates by name, from a file, as text and from a directory."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qst_tune.data import HFChatTokenizer, hf_chat_tokenizer
from qst_tune.data.chat.template_source import template_names
from qst_tune.errors import UserError
from tests.support.chat_directories import CHATML, build_directory

HELLO = {"role": "user", "content": " hello"}
DAY = {"role": "assistant", "content": "good day"}
AND_YOU = {"role": "user", "content": "and you"}
FINE = {"role": "assistant", "content": "fine"}
TURNS = [HELLO, DAY, AND_YOU, FINE]
SYSTEM = {"role": "system", "content": "be kind"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
LONG = "Below is an instruction that describes a task. Write a response that appropriately "
# What each named template writes, by hand from the formats' own documents.
RENDERED = {
    "chatml": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n hello<|im_end|>\n"
    "<|im_start|>assistant\ngood day<|im_end|>\n<|im_start|>user\nand you<|im_end|>\n"
    "<|im_start|>assistant\nfine<|im_end|>\n",
    "qwen": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n hello<|im_end|>\n"
    "<|im_start|>assistant\ngood day<|im_end|>\n<|im_start|>user\nand you<|im_end|>\n"
    "<|im_start|>assistant\nfine<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhello [/INST] good day </s>"
    "<s>[INST] and you [/INST] fine </s>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\ngood day<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nand you<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nfine<|eot_id|>",
    "gemma": "<s><start_of_turn>user\nbe kind\n\nhello<end_of_turn>\n"
    "<start_of_turn>model\ngood day<end_of_turn>\n<start_of_turn>user\nand you<end_of_turn>\n"
    "<start_of_turn>model\nfine<end_of_turn>\n",
    "mistral": "<s>[INST] be kind\n\n hello [/INST] good day</s>[INST] and you [/INST] fine</s>",
    "phi3": "<|system|>\nbe kind<|end|>\n<|user|>\n hello<|end|>\n<|assistant|>\ngood day<|end|>\n"
    "<|user|>\nand you<|end|>\n<|assistant|>\nfine<|end|>\n",
    "zephyr": "<|system|>\nbe kind</s>\n<|user|>\n hello</s>\n<|assistant|>\ngood day</s>\n"
    "<|user|>\nand you</s>\n<|assistant|>\nfine</s>\n",
    "alpaca": "<s>be kind\n\n### Instruction:\n hello\n\n### Response:\ngood day</s>\n\n"
    "### Instruction:\nand you\n\n### Response:\nfine</s>\n\n",
    "vicuna": "<s>be kind USER:  hello ASSISTANT: good day</s> USER: and you ASSISTANT: fine</s>",
}
ENDS = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>", "phi3": "<|end|>"}  # fmt: skip


def directory_with(root: Path, *special: str, template: str | None = None) -> Path:
    """A tokenizer with <s>, </s> and the given special tokens."""
    directory = build_directory(root / "m", template, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>", *special])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def text_of(tokenizer: HFChatTokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)


def learnt(tokenizer: HFChatTokenizer) -> str:
    tokens, mask = tokenizer.tokenize_conversation(TURNS)
    return text_of(tokenizer, [t for t, masked in zip(tokens, mask, strict=True) if not masked])


def test_every_named_template_is_tested() -> None:
    assert template_names() == sorted(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_named_template_writes_the_known_format_and_learns_to_stop(
    tmp_path: Path, name: str
) -> None:
    marker = ENDS.get(name, "</s>")
    directory = directory_with(tmp_path, *([marker] if name in ENDS else []))
    tokenizer = hf_chat_tokenizer(str(directory), chat_template=name)
    tokens, _ = tokenizer.tokenize_conversation([SYSTEM, *TURNS])
    assert text_of(tokenizer, tokens) == RENDERED[name]
    source = tokenizer.chat_template.source
    theirs = AutoTokenizer.from_pretrained(directory)
    settings = {"chat_template": source, "return_dict": False}
    assert tokens == theirs.apply_chat_template([SYSTEM, *TURNS], **settings)
    space = " " if name in ("llama2", "mistral", "vicuna") else ""
    end = " </s>" if name == "llama2" else marker
    assert learnt(tokenizer) == f"{space}good day{end}{space}fine{end}"
    assert tokenizer.special_tokens[marker] in tokenizer.stop_tokens
    prompt, _ = tokenizer.tokenize_conversation([HELLO], add_end_tokens=False)
    assert prompt == theirs.apply_chat_template([HELLO], add_generation_prompt=True, **settings)
    whole, _ = tokenizer.tokenize_conversation([HELLO, DAY])
    assert text_of(tokenizer, whole).startswith(text_of(tokenizer, prompt))


@pytest.mark.parametrize("name", ENDS)
def test_eos_ends_answers_whose_marker_is_no_token(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = hf_chat_tokenizer(str(directory_with(tmp_path)), chat_template=name)
    if ENDS[name] not in tokenizer.special_tokens:
        assert f"'{ENDS[name]}', with which chat_template={name} ends a turn" in caplog.text
        end = f"{ENDS[name]}</s>"
        assert learnt(tokenizer) == f"good day{end}fine{end}"
    assert tokenizer.eos_id in tokenizer.stop_tokens


@pytest.mark.parametrize("given", ["my.jinja", "my.txt", "~/my.jinja"])
def test_a_file_is_read(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(given).expanduser().write_text(CHATML)
    directory = str(build_directory(tmp_path / "m", "{{ messages[0].content }}"))
    expected = hf_chat_tokenizer(directory, chat_template=CHATML).tokenize_conversation(TURNS)
    found = hf_chat_tokenizer(directory, chat_template=given).tokenize_conversation(TURNS)
    assert found == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.jinja", "chat_template=absent.jinja is no file, no Jinja template and no name"),
        ("chatmll", "the names are alpaca, chatml, gemma"),
        ("hello", "chat_template=hello is no file"),
        ("{{ 'hello' }}", "does not render the content of user messages"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "does not render the content of assistant messages",
        ),
        ("{% for m in messages %}{{ m.content }}", "is no chat template: .*Unexpected end"),
        ("{{ messages[7].content }}", "is no chat template: .*refuses"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf_chat_tokenizer(str(build_directory(tmp_path / "m")), chat_template=given)


def test_a_file_that_is_no_template_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("{{ 'hello' }}")
    with pytest.raises(UserError, match=re.escape(f"{path} is no chat template")):
        hf_chat_tokenizer(str(build_directory(tmp_path / "m")), chat_template=str(path))


DEFAULT, TOOL_USE = CHATML, "{{ tools | tojson if tools }}" + CHATML


def as_list(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": TOOL_USE},
        {"name": "default", "template": DEFAULT},
    ]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def as_files(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(DEFAULT)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)


@pytest.mark.parametrize("write", [as_list, as_files])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
def test_several_templates_of_a_directory_are_chosen_as_by_transformers(
    tmp_path: Path, write: object, tools: list[dict[str, object]] | None
) -> None:
    directory = build_directory(tmp_path / "m", None)
    write(directory)
    tokens, _ = hf_chat_tokenizer(str(directory)).tokenize_conversation(TURNS, tools=tools)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert tokens == theirs.apply_chat_template(TURNS, tools=tools, return_dict=False)


def test_several_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    directory = build_directory(tmp_path / "m", [{"name": "rag", "template": CHATML}])
    with pytest.raises(UserError, match="has the chat templates rag and none called default"):
        hf_chat_tokenizer(str(directory))
