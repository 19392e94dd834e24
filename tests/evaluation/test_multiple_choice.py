"""Questions: how they are read and written, and that the likeliest letter is the answer."""

import json

import pytest
import torch

from qst_tune.data import hf_chat_tokenizer
from qst_tune.errors import UserError
from qst_tune.evaluation.multiple_choice import (
    ChoiceScore,
    Question,
    prompt_of,
    question_passes,
    read_questions,
)
from qst_tune.models import qst_decoder
from qst_tune.training.task import complete
from tests.support.checkpoints import write_chat_tokenizer
from tests.support.numbers import TINY_REDUCTION, randomize_, tiny_backbone

QUESTION = Question("What is it? ", ("red", "blue"), 1, "of_boxes")
EXAMPLE = Question("And this?", ("big", "small"), 0, "of_boxes")


def test_the_prompt_is_mmlus() -> None:
    assert prompt_of(QUESTION, [EXAMPLE]) == (
        "The following are multiple choice questions (with answers) about of boxes.\n\n"
        "And this?\nA. big\nB. small\nAnswer: A\n\n"
        "What is it?\nA. red\nB. blue\nAnswer:"
    )


def test_a_file_is_read_with_letters_or_numbers_and_mistakes_have_their_line(tmp_path) -> None:
    row = {"question": "What?", "choices": ["x", "y"], "subject": "s"}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**row, "answer": answer}) for answer in (1, "B")) + "\n")
    assert read_questions(file) == [Question("What?", ("x", "y"), 1, "s")] * 2
    for wrong, reason in [
        ({**row, "answer": 2}, r"line 2\) is no question \(answer 2 is none of 2 choices"),
        ({**row, "answer": "Z"}, r"line 2\) is no question"),
        (row, "no column 'answer'"),
        ([1], r"line 2\) is no question \(it is a list"),
    ]:
        file.write_text(f"{json.dumps({**row, 'answer': 0})}\n{json.dumps(wrong)}\n")
        with pytest.raises(UserError, match=reason):
            read_questions(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="has no questions"):
        read_questions(file)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"answer": True}, "answer True is none of 2 choices"),
        ({"answer": 1.7}, "answer 1.7 is none"),
        ({"answer": ""}, "answer '' is none"),
        ({"answer": "AB"}, "answer 'AB' is none"),
        ({"answer": -1}, "answer -1 is none"),
        ({"answer": None}, "answer None is none"),
        ({"choices": "AB"}, r"choices are text \('AB'\): there must be 2 to 10"),
        ({"choices": ["x"]}, "there must be 2 to 10"),
        ({"choices": [str(i) for i in range(11)]}, "there must be 2 to 10"),
        ({"choices": ["x", None]}, "a choice is null: it must be text or a number"),
        ({"choices": [["x"], ["y"]]}, "a choice is a list"),
        ({"question": None}, "question is null: it must be text"),
        ({"question": 5}, "question is a number"),
        ({"question": " "}, "question is text"),
        ({"question": "\ud800"}, "is half a character"),
        ({"subject": ["s"]}, "subject is a list"),
    ],
)
def test_a_value_of_a_wrong_type_is_never_read_as_something_else(changed, reason, tmp_path) -> None:
    row = {"question": "What?", "choices": ["x", "y"], "answer": 0, **changed}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=reason) as raised:
        read_questions(tmp_path / "rows.jsonl")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_ends_with_its_line_alone(end, tmp_path) -> None:
    """A question of MMLU has the next-line character within its text."""
    text = "first\x85second\u2028third\x0cfourth"
    row = {"question": text, "choices": ["x", "y"], "answer": 1}
    file = tmp_path / "rows.jsonl"
    file.write_bytes(f"{json.dumps(row, ensure_ascii=False)}{end}".encode() * 2)
    assert read_questions(file) == [Question(text, ("x", "y"), 1)] * 2


@torch.no_grad()
def test_the_answer_is_the_likeliest_letter_in_any_batch(tmp_path) -> None:
    write_chat_tokenizer(tmp_path)
    tokenizer = hf_chat_tokenizer(str(tmp_path))
    backbone = tiny_backbone(vocab_size=320, max_seq_len=512)
    model = qst_decoder(backbone, reduction_factor=TINY_REDUCTION).eval()
    randomize_(model.side)
    texts = ["what is it", "which box", "is the colour of it", "why"]
    chosen, questions = [], []
    for text in texts:
        question = Question(text, ("red", "blue", "green"), 0, "of_boxes")
        prompt = prompt_of(question, [EXAMPLE])
        sums = []
        for letter in "ABC":
            tokens = tokenizer.encode(f"{prompt} {letter}", add_bos=False, add_eos=False)
            start = len(tokenizer.encode(prompt, add_bos=False, add_eos=False))
            log_probs = model(torch.tensor([tokens]))[0].log_softmax(-1)
            sums.append(sum(log_probs[i - 1, tokens[i]].item() for i in range(start, len(tokens))))
        chosen.append(sums.index(max(sums)))
    # Two of them answered right by the model's own choice, two wrong.
    for number, (text, choice) in enumerate(zip(texts, chosen, strict=True)):
        answer = choice if number < 2 else (choice + 1) % 3
        questions.append(Question(text, ("red", "blue", "green"), answer, "of_boxes"))
    other = Question("of another subject", ("a", "b"), 0, "other")
    for batch_size in (1, 7):
        score = complete(question_passes(
            model, tokenizer, questions, [other, EXAMPLE, EXAMPLE],
            num_examples=1, batch_size=batch_size,
        ))  # fmt: skip
        assert score == ChoiceScore(2, 4)
    assert score.accuracy == 0.5
    assert score.standard_error == 0.25
