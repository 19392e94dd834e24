"""Conversations: what the model is given at each turn, what is run of it, and what is shown."""

from collections import Counter

import pytest
import torch
from torchtune.data import Message

from qst_tune.data import hf_chat_tokenizer
from qst_tune.errors import UserError
from qst_tune.generation.conversation import Conversation, prompt_tokens, text_pieces
from qst_tune.models import qst_decoder
from tests.support.checkpoints import write_chat_tokenizer
from tests.support.numbers import TINY_REDUCTION, randomize_, tiny_backbone


@pytest.fixture
def tokenizer(tmp_path):
    write_chat_tokenizer(tmp_path)
    return hf_chat_tokenizer(str(tmp_path))


@pytest.fixture
def model():
    backbone = tiny_backbone(vocab_size=320, max_seq_len=160)
    model = qst_decoder(backbone, reduction_factor=TINY_REDUCTION)
    randomize_(model.side)
    return model.eval()


def talk(conversation, *questions):
    return ["".join(conversation.ask(question)) for question in questions]


@torch.no_grad()
def stateless_answer(model, tokenizer, messages, count):
    """Greedy, everything anew for each token."""
    prompt, answer = prompt_tokens(tokenizer, messages), []
    while len(answer) < count:
        token = model(torch.tensor([prompt + answer]))[0, -1].argmax().item()
        if token in tokenizer.stop_tokens:
            break
        answer.append(token)
    return tokenizer.decode(answer)


def test_every_answer_is_that_of_a_model_that_reads_everything_anew(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer, system_prompt="be kind", max_new_tokens=8)
    talk(conversation, "what is it", "and the colour", "why")
    system = Message(role="system", content="be kind")
    turns = conversation.messages
    assert [turn.role for turn in turns] == ["user", "assistant"] * 3
    for index in (0, 2, 4):
        before = [system, *turns[: index + 1]]
        assert turns[index + 1].text_content == stateless_answer(model, tokenizer, before, 8)


def test_a_turn_runs_its_own_tokens_only(model, tokenizer) -> None:
    # The answers are "zzzz": what random weights say may be tokenized otherwise than it was made.
    (letter,) = tokenizer.encode("z", add_bos=False, add_eos=False)
    favour = torch.zeros(320).index_fill(0, torch.tensor(letter), 1e4)
    model.output.register_forward_hook(lambda module, args, out: out + favour)
    conversation = Conversation(model, tokenizer, max_new_tokens=4)
    counted = Counter()
    model.tok_embeddings.register_forward_hook(
        lambda module, args, out: counted.update(tokens=args[0].numel())
    )
    talk(conversation, "what is it")
    first_prompt = len(prompt_tokens(tokenizer, conversation.messages[:1]))
    answered = len(conversation._sequence.tokens) - first_prompt
    assert counted["tokens"] == first_prompt + answered
    before = list(conversation._sequence.tokens)
    counted.clear()
    talk(conversation, "and the colour")
    prompt = prompt_tokens(tokenizer, conversation.messages[:3])
    assert prompt[: len(before)] == before  # the text is tokenized as it was generated
    assert counted["tokens"] == len(conversation._sequence.tokens) - len(before) < len(prompt)


def test_clear_begins_anew(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=6)
    first, _ = talk(conversation, "what is it", "why")
    conversation.clear()
    assert talk(conversation, "what is it") == [first]
    assert len(conversation.messages) == 2


def test_a_full_context_is_reported_and_changes_nothing(model, tokenizer) -> None:
    conversation = Conversation(model, tokenizer, max_new_tokens=4)
    talk(conversation, "what is it")
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"context is full: the conversation has \d+ tokens .* 160"):
        talk(conversation, "why " * 200)
    assert conversation.messages == before
    assert not conversation.is_full


def test_an_answer_that_meets_the_end_of_the_context_ends_there(model, tokenizer) -> None:
    tokenizer.stop_tokens = []
    conversation = Conversation(model, tokenizer, max_new_tokens=1000)
    talk(conversation, "what is it")
    assert conversation.is_full
    assert len(conversation._sequence.tokens) == 160


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(model, tokenizer) -> None:
    tokenizer.stop_tokens = []
    conversation = Conversation(model, tokenizer, max_new_tokens=20)
    pieces = conversation.ask("what is it")
    came = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1].text_content == came
    assert talk(conversation, "why") != [""]


def test_pieces_are_whole_characters_and_together_the_text(tokenizer) -> None:
    text = "a colour é 😀 it is"
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    pieces = list(text_pieces(iter(ids), tokenizer.decode))
    assert "".join(pieces) == text
    assert "😀" in "".join(p for p in pieces if "\ufffd" not in p)
    assert not any("\ufffd" in piece for piece in pieces)
    cut = ids[: ids.index(tokenizer.encode("😀", add_bos=False, add_eos=False)[0]) + 1]
    assert "".join(text_pieces(iter(cut), tokenizer.decode)) == tokenizer.decode(cut)
