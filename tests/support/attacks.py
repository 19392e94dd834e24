"""Run commands on damaged or hostile input, each in a forked process with bounds.

An :class:`Attack` changes a copy of a directory that has a tiny model, data, a config and a
finished run, then runs a command there. To add one, add a row to a table of ``tests/attacks``.
"""

import io
import json
import logging
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import (
    Config,
    colour_rows,
    finetune_config,
    generate_config,
    write_config,
    write_jsonl,
)
from tests.support.documented_commands import ROOT
from tests.support.recipe_runs import finetune, merged

Change = Callable[[Path], Any]

# Control characters, other than the line's end, that a directory could send to a terminal.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")


class Attack(NamedTuple):
    """What is changed, what is run, and what one line of the answer must have."""

    name: str
    command: str
    expected: str = ""
    change: Change = lambda root: None
    status: int = 2


@dataclass(frozen=True)
class Answer:
    """How a command ended. ``status`` is 128 and more for a signal, 124 after the time limit."""

    status: int
    out: str
    err: str
    seconds: float
    peak_gib: float

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


# The directory that all start from.


def write_place(root: Path) -> Path:
    """A tiny model, data, configs, and one finished run with checkpoints, in a directory."""
    config = place_config(root)
    write_config(root / "config.yaml", config)
    write_config(root / "gen.yaml", generate_config(root))
    finetune(merged(config), root / "run")
    return root


def place_config(root: Path) -> Config:
    config = finetune_config(root)
    write_jsonl(root / "train.jsonl", colour_rows(8))
    config.update(save_every_n_steps=1, run_val_every_n_steps=1, keep_last_n_checkpoints=3)
    config.update(batch_size=4, epochs=2)
    return config


def copy_of(place: Path, root: Path) -> Path:
    """The same in another directory, to be changed."""
    shutil.copytree(place, root, dirs_exist_ok=True)
    for name in ("config.yaml", "gen.yaml"):
        path = root / name
        path.write_text(path.read_text().replace(str(place), str(root)))
    return root


# Running.


def answer_of(
    command: str, root: Path, *, seconds: float = 60, gib: float = 4, user: int | None = None
) -> Answer:
    """Run ``tune run ...``, ``sharing ...`` or ``load DIR`` in a fork, in ``root``.

    The fork may take ``gib`` more address space than this process, and is killed after ``seconds``.
    It runs as ``user`` if that is given, to whom the directory then belongs.
    """
    out, err = (root.parent / f"{root.name}.{name}" for name in ("out", "err"))
    begin = time.perf_counter()
    process = os.fork()
    if process == 0:
        _child(command, root, out, err, gib, user)  # does not return
    status, peak = _wait(process, begin + seconds)
    took = time.perf_counter() - begin
    texts = [path.read_bytes().decode(errors="surrogateescape") for path in (out, err)]
    return Answer(status, *texts, took, peak / 2**20)


def _wait(process: int, end: float) -> tuple[int, int]:
    while True:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (128 - code if code < 0 else code), usage.ru_maxrss
        if time.perf_counter() > end:
            os.kill(process, signal.SIGKILL)
            return 124, os.wait4(process, 0)[2].ru_maxrss
        time.sleep(0.005)


def _child(command: str, root: Path, out: Path, err: Path, gib: float, user: int | None) -> None:
    status = 1
    try:
        for path, descriptor in ((out, 1), (err, 2)):
            file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            os.dup2(file, descriptor)
        sys.stdin = open(os.devnull)  # noqa: SIM115  # until the process ends
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), errors="backslashreplace")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), errors="backslashreplace")
        _log_to(sys.stderr)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = int(pages * os.sysconf("SC_PAGE_SIZE") + gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1")
        torch.set_num_threads(1)
        os.chdir(root)
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        _run(shlex.split(command))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _log_to(stream: Any) -> None:
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for logger in loggers:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                with suppress(AttributeError):  # one that always asks for sys.stderr
                    handler.stream = stream


def _run(words: list[str]) -> None:
    if words[0] == "tune":
        sys.argv = [words[2], *words[3:]]
        runpy.run_path(str(ROOT / f"recipes/{words[2]}.py"), run_name="__main__")
    elif words[0] == "sharing":
        from qst_tune.sharing.__main__ import main

        main(words[1:])
    elif words[0] == "load":
        _load(words[1])
    else:
        raise ValueError(f"no such command: {words}")


def _load(directory: str) -> None:
    """transformers' way; a UserError is for the caller to print."""
    from qst_tune.errors import UserError
    from qst_tune.transformers import QSTForCausalLM

    try:
        QSTForCausalLM.from_pretrained(directory)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def assert_held(attack: Attack, root: Path, answer: Answer, before: set[str]) -> None:
    """One line with what is expected, no traceback, nothing left, no control characters."""
    shown = f"{attack.command}\nstatus {answer.status}\n{answer.text[-3000:]}"
    assert "Traceback" not in answer.text, shown
    assert answer.status == attack.status, shown
    assert not CONTROL.search(answer.text), shown
    assert re.search(attack.expected, answer.text), shown
    if attack.status == 2:
        assert answer.errors, shown
        left = {path.name for path in root.iterdir()} - before
        assert left <= {"cache"}, f"{shown}\nleft: {left}"


def held(attack: Attack, place: Path, root: Path) -> Answer:
    """Attack a fresh copy; AssertionError if it does not hold."""
    copy_of(place, root)
    attack.change(root)
    before = {path.name for path in root.iterdir()}
    answer = answer_of(attack.command.replace("{root}", str(root)), root)
    assert_held(attack, root, answer, before)
    return answer


# Changes.


def edit_json(name: str, edit: Callable[[Any], Any]) -> Change:
    """Edit a JSON file in place, or replace its content with what is returned."""

    def change(root: Path) -> None:
        path = root / name
        content = json.loads(path.read_text())
        returned = edit(content)
        path.write_text(json.dumps(content if returned is None else returned))

    return change


def edit_tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Edit the tensors of a file in place, or replace them with what is returned."""

    def change(root: Path) -> None:
        tensors = load_file(root / name)
        returned = edit(tensors)
        found = returned if isinstance(returned, dict) else tensors
        save_file({k: v.contiguous() for k, v in found.items()}, root / name, {"format": "pt"})

    return change


def edit_text(name: str, old: str, new: str) -> Change:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text, f"{old!r} is not in {name}"
        (root / name).write_text(text.replace(old, new))

    return change


def write(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(data)


def put(value: Any, *path: str | int) -> Callable[[Any], None]:
    """Set what is at a path of nested mappings."""

    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edit


def pop(*path: str) -> Callable[[Any], None]:
    """Remove what is at a path of nested mappings."""

    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return edit


def both(*changes: Change) -> Change:
    def change(root: Path) -> None:
        for each in changes:
            each(root)

    return change
