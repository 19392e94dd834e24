"""Run recipes: through the real ``tune`` in a process of its own, or faster inside this one."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from qst_tune.recipes import qst_finetune
from safetensors.torch import load_file
from torchtune import utils
from torchtune._cli.tune import TuneCLIParser
from torchtune.data import Message

from qst_tune.data import hf_chat_tokenizer
from tests.support.checkpoints import Config


@dataclass(frozen=True)
class FinetuneResult:
    """What a run of qst_finetune left in its output directory."""

    directory: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    @property
    def train_loss(self) -> torch.Tensor:
        return torch.tensor(list(self.summary["train_loss"].values()), dtype=torch.float64)

    @property
    def val_loss(self) -> dict[int, float]:
        return {int(step): loss for step, loss in self.summary["val_loss"].items()}

    @property
    def weights_file(self) -> Path:
        return self.directory / "side_network" / "side_network.safetensors"

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.weights_file)


def run_tune(
    *arguments: str | Path,
    cwd: Path,
    python: str | Path = sys.executable,
    typed: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``tune``; its script is a shim around this module and may be installed elsewhere."""
    return subprocess.run(
        [str(python), "-m", "torchtune._cli.tune", *map(str, arguments)],
        cwd=cwd,
        # One thread: with more, every tiny operation waits for whatever else the machine runs.
        input=typed,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def tune_here(
    *arguments: str | Path, cwd: Path, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ``tune`` in this process, which saves the five seconds that :func:`run_tune` imports.

    torchtune runs a recipe's file as a program in its own process, so nothing else differs.
    """
    words = ["tune", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    log, handler = utils.get_logger("INFO"), logging.StreamHandler(err)
    log.addHandler(handler)
    status: Any = 0
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", words)
            patch.setattr(sys, "path", sys.path.copy())
            patch.setattr(sys, "stdin", io.StringIO(typed))
            with one_thread():
                parser = TuneCLIParser()
                parser.run(parser.parse_args())
    except SystemExit as end:
        status = end.code or 0
    finally:
        log.removeHandler(handler)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@contextmanager
def one_thread() -> Iterator[None]:
    """As in :func:`run_tune`; also makes both kinds of run bit-identical."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merged(config: Config, *overrides: str) -> DictConfig:
    """Config with overrides as on the command line, for a run inside this process."""
    return OmegaConf.merge(OmegaConf.create(config), OmegaConf.from_dotlist(list(overrides)))


def finetune(config: Config, output_dir: Path, *overrides: str) -> FinetuneResult:
    """Run qst_finetune inside this process."""
    with one_thread():
        qst_finetune.main(merged(config, f"output_dir={output_dir}", *overrides))
    return FinetuneResult(output_dir)


def val_loss(model: torch.nn.Module, root: Path) -> float:
    """Mean loss of the answers in ``val.jsonl``, a row at a time and without our training code."""
    tokenizer = hf_chat_tokenizer(str(root / "model"), max_seq_len=64)
    losses = []
    for row in map(json.loads, (root / "val.jsonl").read_text().splitlines()):
        question = Message(role="user", content=row["input"], masked=True)
        answer = Message(role="assistant", content=row["output"])
        tokens, mask = tokenizer.tokenize_messages([question, answer])
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, :-1]
        kept = ~torch.tensor(mask)[1:]
        losses.append(
            F.cross_entropy(logits[kept], torch.tensor(tokens)[1:][kept], reduction="none")
        )
    return torch.cat(losses).mean().item()
