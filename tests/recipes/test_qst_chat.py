"""Chatting through the real `tune`, with a pipe for the keyboard, and through main()."""

import inspect
import io
import re
import sys
from pathlib import Path

import pytest
from qst_tune.recipes import qst_chat

from tests.support.checkpoints import COLOURS, Config, finetune_config, write_config
from tests.support.recipe_runs import finetune, merged, one_thread, tune_here

BOXES = [f"what is the colour of box {i}" for i in range(8)]
ANSWERS = [f"it is {COLOURS[i]}" + "!" * (i % 3) for i in range(8)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    """Of a training run, whose side network knows eight answers by heart."""
    config = {**finetune_config(root), "dataset_val": None}
    finetune(config, root / "run", "epochs=30")
    return config


def typed(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    *lines: str, **settings: object,
) -> tuple[list[str], str]:  # fmt: skip
    """What is printed for what is typed, and the errors."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    with one_thread():
        qst_chat.main(merged({**config, **settings}))
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_tune_answers_line_by_line_from_the_training_config(config: Config, root: Path) -> None:
    path = write_config(root / "train.yaml", config)
    lines = f"{BOXES[1]}\n/clear\n\n{BOXES[4]}\n/exit\n{BOXES[0]}\n"
    result = tune_here("run", "qst_chat", "--config", path, cwd=root, typed=lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [ANSWERS[1], ANSWERS[4]]
    assert "model, with the side network" in result.stderr


def test_a_full_context_is_one_line_and_the_chat_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = typed(config, monkeypatch, capsys, "why " * 200, BOXES[2])
    assert out == [ANSWERS[2]]
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "the context is full" in line
    assert "(/clear begins anew)" in line


def test_the_base_model_answers_without_a_side_network(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"side_network": None, "max_new_tokens": 5}
    out, _ = typed(config, monkeypatch, capsys, BOXES[1], **settings)
    assert out
    assert "".join(out) != ANSWERS[1]


def test_ctrl_c_breaks_an_answer_off_and_not_the_chat(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(qst_chat.Conversation):
        def ask(self, text):
            pieces = super().ask(text)
            yield next(pieces)
            if text == BOXES[1]:
                pieces.close()
                raise KeyboardInterrupt
            yield from pieces

        def clear(self):
            (_, answer) = self.messages
            assert ANSWERS[1].startswith(answer.text_content)
            super().clear()

    monkeypatch.setattr(qst_chat, "Conversation", Interrupted)
    out, _ = typed(config, monkeypatch, capsys, BOXES[1], "/clear", BOXES[4])
    assert len(out[0]) < len(ANSWERS[1])
    assert out[1] == ANSWERS[4]


def test_commands_are_listed_and_never_reach_the_model(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str | None, int, str]] = []

    class Recorded(qst_chat.Conversation):
        def ask(self, text):
            asked.append((self.system_prompt, len(self.messages), text))
            yield from super().ask(text)

    monkeypatch.setattr(qst_chat, "Conversation", Recorded)
    out, err = typed(
        config, monkeypatch, capsys,
        "/help", BOXES[1], "why", "/undo", BOXES[2], "/system be kind", "a", "/system", "b",
        "/halp me", "//etc", "/exit", "never", max_new_tokens=2,
    )  # fmt: skip
    assert out[: len(qst_chat.HELP.splitlines())] == qst_chat.HELP.splitlines()
    assert asked == [
        (None, 0, BOXES[1]),
        (None, 2, "why"),
        (None, 2, BOXES[2]),
        ("be kind", 0, "a"),
        (None, 0, "b"),
        (None, 2, "/etc"),
    ]
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line == (
        "error: unknown command '/halp'; /help lists the commands, //halp me sends this text to "
        "the model"
    )


def test_every_command_is_in_the_help() -> None:
    source = inspect.getsource(qst_chat)
    commands = set(re.findall(r'== "(/\w+)"', source))
    assert len(commands) == 5
    assert commands <= set(re.findall(r"^/\w+", qst_chat.HELP, flags=re.MULTILINE))
