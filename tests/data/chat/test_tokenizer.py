"""Tokens and masks of HFChatTokenizer against transformers' apply_chat_template."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from torchtune.data import Message

from qst_tune.data import HFChatTokenizer, hf_chat_tokenizer
from qst_tune.errors import UserError
from qst_tune.quickstart.smollm2 import fetch_smollm2
from tests.support.chat_directories import CHATML, build_directory
from tests.support.checkpoints import write_chat_tokenizer

# With the tag that makes transformers return the mask of the assistant's tokens.
CHATML_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3's way: a begin token, contents stripped, no text after the end token.
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# Llama 2's way: no header of the assistant, the system prompt inside the user's turn.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no role ' + m['role']) }}{% endif %}{% endfor %}"
)
# Cuts contents, so that none is in the rendering as it was.
CUTTING = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][:3] }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "generation": CHATML_GENERATION, "trimmed": TRIMMED, "inst": INST}

CONVERSATIONS = {
    "one turn": [("user", "hello there"), ("assistant", "good day")],
    "system": [("system", "be kind"), ("user", "hello"), ("assistant", "day 12.5")],
    "turns": [("user", "a b"), ("assistant", "c"), ("user", "hello"), ("assistant", "x y  z")],
    "leading space": [("user", "  hello"), ("assistant", " good\n"), ("user", "\t")],
    "leading newline": [("user", "\n\nhello"), ("assistant", "\n\n  good day")],
    "empty": [("user", ""), ("assistant", "")],
    "not ascii": [("user", "Ünïcödé 🙂 日本"), ("assistant", "“🙂”")],
    "special in text": [("user", "what is <|im_end|>?"), ("assistant", "a token")],
}


def to_messages(conversation: list[tuple[str, str]], **flags: Any) -> list[Message]:
    """Make torchtune messages that learn the assistant's turns only."""
    return [
        Message(role=role, content=content, **{"masked": role != "assistant", **flags})
        for role, content in conversation
    ]


def to_dicts(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation]


def hf_tokenizer(directory: Path) -> Any:
    """Load the same directory with transformers, the independent oracle."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def learnt_text(tokenizer: HFChatTokenizer, tokens: list[int], mask: list[bool]) -> str:
    kept = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    return tokenizer.decode(kept, skip_special_tokens=False)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_tokens_equal_transformers(
    tmp_path: Path, template: str, conversation: list[tuple[str, str]]
) -> None:
    directory = build_directory(tmp_path / "model", template)
    tokenizer, oracle = hf_chat_tokenizer(str(directory)), hf_tokenizer(directory)

    tokens, mask = tokenizer.tokenize_messages(to_messages(conversation))

    assert tokens == oracle.apply_chat_template(to_dicts(conversation), return_dict=False)
    assert len(mask) == len(tokens)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("last", [[], [("assistant", "")]], ids=["user last", "empty assistant"])
def test_inference_ends_with_generation_prompt(
    tmp_path: Path, template: str, last: list[tuple[str, str]]
) -> None:
    directory = build_directory(tmp_path / "model", template)
    conversation = [("user", " a"), ("assistant", "b"), ("user", "hello")]

    sample = {"messages": to_messages(conversation + last), "kept": 1}
    sample = hf_chat_tokenizer(str(directory))(sample, inference=True)

    expected = hf_tokenizer(directory).apply_chat_template(
        to_dicts(conversation), add_generation_prompt=True, return_dict=False
    )
    assert sample == {"tokens": expected, "mask": [True] * len(expected), "kept": 1}


def test_inference_continues_started_answer(tmp_path: Path) -> None:
    directory = build_directory(tmp_path / "model")
    conversation = [("user", "hello"), ("assistant", "good")]

    tokens, _ = hf_chat_tokenizer(str(directory)).tokenize_messages(
        to_messages(conversation), add_end_tokens=False
    )

    expected = hf_tokenizer(directory).apply_chat_template(
        to_dicts(conversation), continue_final_message=True, return_dict=False
    )
    assert tokens == expected


@pytest.mark.parametrize("name", ["one turn", "system", "turns", "not ascii", "empty"])
def test_mask_equals_transformers_assistant_mask(tmp_path: Path, name: str) -> None:
    directory = build_directory(tmp_path / "model", CHATML_GENERATION)

    _, mask = hf_chat_tokenizer(str(directory)).tokenize_messages(to_messages(CONVERSATIONS[name]))

    oracle = hf_tokenizer(directory).apply_chat_template(
        to_dicts(CONVERSATIONS[name]), return_assistant_tokens_mask=True
    )
    assert [not masked for masked in mask] == [bool(m) for m in oracle["assistant_masks"]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "c<|im_end|>x y  z<|im_end|>"),
        (TRIMMED, "c<|im_end|>x y  z<|im_end|>"),
        (INST, " c<|im_end|> x y  z<|im_end|>"),
    ],
    ids=["chatml", "trimmed", "inst"],
)
def test_answers_and_their_end_tokens_are_learnt(
    tmp_path: Path, template: str, expected: str
) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model", template)))
    tokens, mask = tokenizer.tokenize_messages(to_messages(CONVERSATIONS["turns"]))
    assert learnt_text(tokenizer, tokens, mask) == expected


def test_masked_flags_decide(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model")))
    messages = to_messages(CONVERSATIONS["turns"])
    messages[1].masked = True
    messages[2].masked = False

    tokens, mask = tokenizer.tokenize_messages(messages)

    learnt = "<|im_start|>user\nhello<|im_end|>x y  z<|im_end|>"
    assert learnt_text(tokenizer, tokens, mask) == learnt


def test_token_across_header_and_content_is_not_learnt(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model")))
    newlines = tokenizer.encode("\n\n", add_bos=False, add_eos=False)
    assert len(newlines) == 1
    tokens, mask = tokenizer.tokenize_messages(
        to_messages([("user", "a"), ("assistant", "\n\nhello")])
    )
    assert mask[tokens.index(newlines[0])]
    assert learnt_text(tokenizer, tokens, mask) == "\nhello<|im_end|>"


def test_truncation_keeps_length_and_ends_without_loss(tmp_path: Path) -> None:
    directory = str(build_directory(tmp_path / "model"))
    full, full_mask = hf_chat_tokenizer(directory).tokenize_messages(
        to_messages(CONVERSATIONS["turns"])
    )
    cut = hf_chat_tokenizer(directory, max_seq_len=20)

    tokens, mask = cut.tokenize_messages(to_messages(CONVERSATIONS["turns"]))
    prompt, _ = cut.tokenize_messages(to_messages([("user", "a" * 50)]), add_end_tokens=False)

    assert tokens == [*full[:19], cut.eos_id]
    assert mask == [*full_mask[:19], True]
    assert len(prompt) == 20
    assert prompt[-1] != cut.eos_id


def test_conversation_of_exactly_max_seq_len_is_whole(tmp_path: Path) -> None:
    directory = str(build_directory(tmp_path / "model"))
    messages = to_messages(CONVERSATIONS["one turn"])
    expected = hf_chat_tokenizer(directory).tokenize_messages(messages)
    exact = hf_chat_tokenizer(directory, max_seq_len=len(expected[0]))
    assert exact.tokenize_messages(messages) == expected


def test_ids_and_plain_text(tmp_path: Path) -> None:
    directory = build_directory(tmp_path / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tokenizer, oracle = hf_chat_tokenizer(str(directory)), hf_tokenizer(directory)
    ids = tokenizer.encode("hello day")  # no post-processor, so nothing before it

    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        oracle.bos_token_id,
        oracle.eos_token_id,
        oracle.pad_token_id,
    )
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.stop_tokens == [tokenizer.eos_id, 0]
    assert ids == [*oracle("hello day").input_ids, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hello day"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello day<|im_end|>"
    assert tokenizer.special_tokens == {
        token: oracle.convert_tokens_to_ids(token)
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
    }


def test_pad_falls_back_to_eos(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(
        str(build_directory(tmp_path / "m", pad_token=None, bos_token=None))
    )
    assert tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.bos_id is None
    assert tokenizer.encode("a", add_eos=False) == tokenizer.encode("a", False, False)


def test_saved_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    directory = build_directory(tmp_path / "model")
    expected = hf_chat_tokenizer(str(directory)).encode("hello day")
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.enable_truncation(1)
    raw.enable_padding(length=64)
    raw.save(str(directory / "tokenizer.json"))
    assert hf_chat_tokenizer(str(directory)).encode("hello day") == expected


def test_tool_results_are_rendered_as_tool(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model")))
    tokens, _ = tokenizer.tokenize_messages(
        to_messages([("user", "a"), ("assistant", "f()"), ("ipython", "1"), ("assistant", "b")])
    )
    assert "<|im_start|>tool\n1<|im_end|>" in tokenizer.decode(tokens, skip_special_tokens=False)


def test_survives_pickling_after_use(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model")))
    messages = to_messages(CONVERSATIONS["turns"])
    expected = tokenizer.tokenize_messages(messages)
    assert pickle.loads(pickle.dumps(tokenizer)).tokenize_messages(messages) == expected


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        hf_chat_tokenizer(str(tmp_path / "absent"))


def test_without_a_template_plain_text_is_encoded_and_messages_name_the_fix(
    tmp_path: Path,
) -> None:
    directory = build_directory(tmp_path / "model", None)
    tokenizer = hf_chat_tokenizer(str(directory))
    assert tokenizer.encode("hello", add_eos=False) == hf_tokenizer(directory)("hello").input_ids
    assert tokenizer.stop_tokens == [tokenizer.eos_id]
    with pytest.raises(UserError, match=r"tokenizer\.chat_template=chatml \(or one of alpaca"):
        tokenizer.tokenize_messages(to_messages(CONVERSATIONS["one turn"]))


def test_missing_eos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no eos_token"):
        hf_chat_tokenizer(str(build_directory(tmp_path / "model", eos_token=None)))


def test_a_content_that_the_template_changes_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model", CUTTING)))
    with pytest.raises(UserError, match=r"message 1 \(assistant\) cannot be found"):
        tokenizer.tokenize_messages(to_messages(CONVERSATIONS["one turn"]))


def test_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(build_directory(tmp_path / "model", INST)))
    with pytest.raises(ValueError, match="refuses this conversation: no role tool"):
        tokenizer.tokenize_messages(to_messages([("user", "a"), ("ipython", "b")]))


@pytest.mark.pretrained
@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_smollm2_tokens_equal_transformers(conversation: list[tuple[str, str]]) -> None:
    try:
        directory = fetch_smollm2()
    except UserError as error:
        pytest.skip(str(error))
    tokens, mask = hf_chat_tokenizer(str(directory)).tokenize_messages(to_messages(conversation))
    oracle = hf_tokenizer(directory)
    assert tokens == oracle.apply_chat_template(to_dicts(conversation), return_dict=False)
    assert len(mask) == len(tokens)


def test_another_padding_token_can_be_named(tmp_path: Path) -> None:
    write_chat_tokenizer(tmp_path)
    own = hf_chat_tokenizer(str(tmp_path))
    other = hf_chat_tokenizer(str(tmp_path), pad_token="<|endoftext|>")
    assert own.pad_id == own.special_tokens["<|pad|>"]
    assert other.pad_id == own.special_tokens["<|endoftext|>"]
    with pytest.raises(ValueError, match="pad_token 'absent' is not in the tokenizer's vocabulary"):
        hf_chat_tokenizer(str(tmp_path), pad_token="absent")
