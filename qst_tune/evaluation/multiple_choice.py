"""Questions with several answers, one of them right, such as MMLU, from local files."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.rows.json_rows import FileText, JsonLines
from qst_tune.data.values import JsonObject, kind_of
from qst_tune.errors import UserError
from qst_tune.evaluation.log_likelihood import Continuation, log_likelihood_passes
from qst_tune.generation.caches import Decoder
from qst_tune.training.task import Passes

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """One question."""

    text: str
    choices: tuple[str, ...]  # up to ten
    answer: int  # index of the right choice
    subject: str = ""  # questions of a subject share their examples; may be empty


@dataclass(frozen=True)
class ChoiceScore:
    """How many questions were answered right."""

    num_right: int
    num_questions: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, between 0 and 1."""
        return self.num_right / self.num_questions

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, over the choice of questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_questions)


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file with the columns question, choices, answer and perhaps subject.

    ``answer`` is an index or a letter. UserError for a file that cannot be read or is empty, and
    for an invalid line, which it names.
    """
    rows = JsonLines(FileText(path))
    if not len(rows):
        raise UserError(f"{path} has no questions")
    questions = []
    for index in range(len(rows)):
        try:
            questions.append(_question(rows[index]))
        except UserError as error:
            raise UserError(
                f"{rows.place(index)} is no question ({error}): write question, choices and answer"
            ) from error
    return questions


def _question(row: JsonObject) -> Question:
    if missing := [name for name in ("question", "choices", "answer") if name not in row]:
        raise UserError(f"no column {missing[0]!r}")
    subject = row.get("subject")
    for name, value in (("question", row["question"]), ("subject", subject or "none")):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{name} is {kind_of(value)}: it must be text")
    choices = row["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"choices are {kind_of(choices)}: there must be 2 to {len(LETTERS)}")
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, str | int | float):
            raise UserError(f"a choice is {kind_of(choice)}: it must be text or a number")
    right = _index(row["answer"])
    if right not in range(len(choices)):
        raise UserError(f"answer {row['answer']!r} is none of {len(choices)} choices")
    return Question(row["question"], tuple(map(str, choices)), right, subject or "")


def _index(answer: object) -> int:
    """Index of a choice, or -1."""
    if isinstance(answer, str) and len(answer) == 1:
        return LETTERS.find(answer)
    return answer if type(answer) is int else -1


def prompt_of(question: Question, examples: Sequence[Question]) -> str:
    """Write the prompt of MMLU (https://arxiv.org/abs/2009.03300), ending with "Answer:"."""
    topic = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    head = f"The following are multiple choice questions (with answers){topic}.\n\n"
    answered = [f"{_asked(example)} {LETTERS[example.answer]}\n\n" for example in examples]
    return head + "".join(answered) + _asked(question)


def _asked(question: Question) -> str:
    choices = zip(LETTERS, question.choices, strict=False)
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in choices)
    return f"{question.text.strip()}\n{listed}Answer:"


def question_passes(
    model: Decoder,
    tokenizer: ModelTokenizer,
    questions: Sequence[Question],
    examples: Sequence[Question],
    *,
    num_examples: int,
    batch_size: int,
) -> Passes[ChoiceScore]:
    """Take the most likely letter as the answer and count the right ones, a batch a pass.

    The first ``num_examples`` of a question's subject come before it; MMLU's figure is 5.
    """
    of_subject: dict[str, list[Question]] = defaultdict(list)
    for example in examples:
        of_subject[example.subject].append(example)
    asked = []
    for question in questions:
        prompt = prompt_of(question, of_subject[question.subject][:num_examples])
        asked += [
            _encode(tokenizer, prompt, f" {LETTERS[i]}") for i in range(len(question.choices))
        ]
    passes = log_likelihood_passes(model, asked, batch_size=batch_size, name="questions")
    scores = iter((yield from passes))
    num_right = 0
    for question in questions:
        own = [next(scores) for _ in question.choices]
        num_right += own.index(max(own)) == question.answer
    return ChoiceScore(num_right, len(questions))


def _encode(tokenizer: ModelTokenizer, context: str, target: str) -> Continuation:
    # Together, since a space belongs to the token after it.
    alone = tokenizer.encode(context, add_bos=True, add_eos=False)
    whole = tokenizer.encode(context + target, add_bos=True, add_eos=False)
    return Continuation(tuple(whole[: len(alone)]), tuple(whole[len(alone) :]))
