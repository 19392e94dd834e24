"""Faults, attacks and damaged files that were once found; each must have its right answer.

A row is a name, a command, what its one line must have, and what is changed before. A case that
takes several commands is a function below.
"""

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support.attacks import (
    Attack,
    Change,
    answer_of,
    copy_of,
    edit_json,
    edit_tensors,
    edit_text,
    held,
    pop,
    put,
    write,
)
from tests.support.checkpoints import write_jsonl
from tests.support.malformed import DESCRIPTION, INSPECT, SIDE, VERIFY

TRAIN = "tune run qst_finetune --config config.yaml output_dir={root}/new epochs=1"
LOAD = "load run/side_network"
FAKE = "hf_FAKE_not_a_secret"
A_WEIGHT = "model.layers.1.mlp.up_proj.weight"


def edit_yaml(name: str, edit) -> Change:
    def change(root: Path) -> None:
        content = yaml.safe_load((root / name).read_text())
        edit(content)
        (root / name).write_text(yaml.safe_dump(content))

    return change


def replaced_backbone(root: Path) -> None:
    """Weights of the directory's author, reached from the user's own directory by dots."""
    weights = load_file(root / "model/model.safetensors")
    evil = {k: -v if "mlp" in k else v for k, v in weights.items()}
    save_file(evil, root / "run/side_network/evil.safetensors", metadata={"format": "pt"})
    files = ["../" * 12 + str(root / "run/side_network/evil.safetensors").lstrip("/")]
    edit = edit_yaml(
        "run/side_network/recipe_config.yaml", put(files, "checkpointer", "checkpoint_files")
    )
    edit(root)


def noise(weights: dict[str, torch.Tensor]) -> None:
    """All values but 64 of each tensor, evenly spread, are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        flat = weight.reshape(-1).clone()
        mask = torch.ones(flat.numel(), dtype=torch.bool)
        mask[:: max(1, flat.numel() // 64)] = False
        flat[mask] = torch.randn(int(mask.sum()), generator=generator) * weight.std()
        weights[name] = flat.reshape(weight.shape)


def set_nan(weights: dict[str, torch.Tensor]) -> None:
    weights[A_WEIGHT].view(-1)[7] = float("nan")


LONG_PROMPTS = [{"input": "box " * 200, "output": "it is red"}] * 8
NO_LABELS = lambda root: write_jsonl(root / "train.jsonl", LONG_PROMPTS)  # noqa: E731
WITHOUT_VALIDATION = f"{TRAIN} dataset_val=null"

CASES = [
    # Trained on nothing.
    Attack("every prompt fills the row", WITHOUT_VALIDATION, "token to learn", NO_LABELS),
    Attack("rows of one token", f"{WITHOUT_VALIDATION} tokenizer.max_seq_len=1", "token to learn"),
    Attack(
        "template that is a path of no file",
        f"{WITHOUT_VALIDATION} tokenizer.chat_template=/nope/chatml.jinja",
        "chat_template",
    ),
    # Whose backbone is it?
    Attack("files of the backbone outside its directory", VERIFY, "", replaced_backbone),
    Attack(
        "backbone of noise that equals 64 values a tensor",
        VERIFY,
        "belongs to|differ|another",
        edit_tensors("model/model.safetensors", noise),
    ),
    Attack(
        "one changed bit of the backbone",
        VERIFY,
        "belongs to|differ|another",
        edit_tensors(
            "model/model.safetensors", lambda w: w[A_WEIGHT].view(torch.int32).view(-1)[5].add_(1)
        ),
    ),
    # Tensors of a result.
    Attack(
        "side network of NaN",
        VERIFY,
        "not finite|finite",
        edit_tensors(SIDE, lambda w: {k: v * float("nan") for k, v in w.items()}),
    ),
    Attack(
        "side network of truth values",
        VERIFY,
        "dtype|BOOL|bool|floating",
        edit_tensors(SIDE, lambda w: {k: v > 0 for k, v in w.items()}),
    ),
    Attack(
        "side network of integers",
        VERIFY,
        "dtype|I64|int64|floating",
        edit_tensors(SIDE, lambda w: {k: (v * 1000).long() for k, v in w.items()}),
    ),
    # The description.
    *(
        Attack(f"description, {name}, {command.split()[1]}", command, "qst_config.json", edit)
        for command in (INSPECT, VERIFY)
        for name, edit in {
            "no backbone": edit_json(DESCRIPTION, pop("backbone")),
            "backbone of text": edit_json(DESCRIPTION, put("x", "backbone")),
            "model of a list": edit_json(DESCRIPTION, put([1], "model")),
            "structure of a list": edit_json(DESCRIPTION, put([1], "structure")),
            "results of text": edit_json(DESCRIPTION, put({"loss": "x"}, "results")),
            "escapes": edit_json(DESCRIPTION, put("\x1b[31mm\nfinite  0", "backbone", "name")),
            "deep": write(DESCRIPTION, '{"a":' * 20_000),
        }.items()
    ),
    # Absurd sizes.
    *(
        Attack(
            f"{key} of {str(value)[:20]}, {command.split()[0]}",
            command,
            "",
            edit_json(DESCRIPTION, put(value, "model", key)),
        )
        for key, value in (
            ("num_layers", 100_000),
            ("max_seq_len", 100_000_000),
            ("rank", 10**9),
            ("embed_dim", 2**40),
            ("lora_layers", 10**9),
            ("lora_rank", 10**9),
            ("lora_attn_modules", ["q_proj"] * 100_000),
        )
        for command in (VERIFY, LOAD)
    ),
    # One line that names the cause.
    Attack(
        "a weight of the backbone is NaN",
        f"{TRAIN} dataset_val=null",
        re.escape(A_WEIGHT) + "|layers.1.mlp.w3",
        edit_tensors("model/model.safetensors", set_nan),
    ),
    Attack(
        "a token that the embedding lacks",
        TRAIN,
        "400",
        edit_json("model/tokenizer.json", put(400, "model", "vocab", "t")),
    ),
    Attack(
        "values that refer to each other",
        f"{TRAIN} 'seed=${{batch_size}}' 'batch_size=${{seed}}'",
        "seed|batch_size",
    ),
    Attack("a long path", f"{TRAIN} output_dir={{root}}/{'a' * 300}", "too long"),
    Attack("device meta", f"{TRAIN} device=meta", "device=meta"),
    Attack("collate function that is none", f"{TRAIN} collate_fn=os.system", "collate_fn"),
    Attack("log file in no directory", f"{TRAIN} metric_logger.filename=a/b/c", "metric_logger"),
    Attack("null key", TRAIN, "config.yaml", lambda root: append(root, "~: 4\n")),
    Attack(
        "deep config.json",
        "tune run qst_finetune --config auto.yaml output_dir={root}/new checkpoint_dir={root}/model"
        " dataset.data_files={root}/train.jsonl device=cpu",
        "config.json",
        lambda root: (write("model/config.json", '{"a":' * 20_000)(root), copy_auto(root)),
    ),
]  # fmt: skip


def append(root: Path, text: str) -> None:
    path = root / "config.yaml"
    path.write_text(path.read_text() + text)


def copy_auto(root: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "configs/auto/qst.yaml", root / "auto.yaml")


@pytest.mark.parametrize("attack", CASES, ids=lambda attack: attack.name)
def test_case_is_one_line_that_names_the_cause(attack: Attack, place: Path, tmp_path: Path) -> None:
    answer = held(attack, place, tmp_path / "at")
    # Five seconds on quiet cores; tests may run beside others.
    assert answer.seconds < 30
    assert answer.peak_gib < 1.5


# Secrets.


def files_with(text: str, *directories: Path) -> list[Path]:
    return [
        path
        for directory in directories
        for path in directory.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


@pytest.fixture
def at(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_TOKEN", FAKE)
    return copy_of(place, tmp_path / "at")


def test_secret_of_the_environment_is_in_no_file_of_a_run_or_of_what_is_shared(at: Path) -> None:
    edit_text("config.yaml", "  source: json\n", "  source: json\n  token: ${oc.env:FAKE_TOKEN}\n")(
        at
    )
    trained = answer_of("tune run qst_finetune --config config.yaml output_dir=new epochs=1", at)
    assert trained.status == 0, trained.text
    shared = answer_of("sharing share new/side_network pub --name me/x --base-model org/b", at)
    assert shared.status == 0, shared.text
    assert files_with(FAKE, at / "new", at / "pub") == []
    assert "token" in shared.text, "what is left out is reported"
    assert files_with("oc.env", at / "pub") == []


def test_secret_that_is_written_in_a_config_is_not_shared(at: Path) -> None:
    edit_yaml("run/side_network/recipe_config.yaml", put(FAKE, "dataset", "hf_token"))(at)
    shared = answer_of("sharing share run/side_network pub --name me/x --base-model org/b", at)
    assert shared.status == 0, shared.text
    assert files_with(FAKE, at / "pub") == []
    assert "hf_token" in shared.text


def test_config_of_a_foreign_directory_is_not_evaluated(at: Path) -> None:
    edit_text("run/side_network/recipe_config.yaml", "rank: 4", "rank: ${oc.env:FAKE_TOKEN}")(at)
    answer_of("sharing share run/side_network pub --name me/x --base-model org/b", at)
    assert not (at / "pub").exists() or files_with(FAKE, at / "pub") == []


def test_the_card_of_a_shared_directory_runs_no_code_of_its_author(at: Path) -> None:
    evil = {"_component_": "os.system", "command": "touch CODE_RAN"}
    edit_yaml("run/side_network/recipe_config.yaml", put(evil, "tokenizer"))(at)
    answer_of("sharing share run/side_network pub --name me/x --base-model org/b", at)
    card = (at / "pub/README.md").read_text() if (at / "pub").exists() else ""
    for command in re.findall(r"^(?:tune run|python -m) .*$", card, re.MULTILINE):
        assert "--config recipe_config.yaml" not in command, "a config is code"
    assert not (at / "CODE_RAN").exists()


# Caches.

CACHED = (
    "tune run qst_finetune --config auto.yaml output_dir={root}/{name} epochs=1 device=cpu "
    "checkpoint_dir={root}/model dataset.data_files={root}/train.jsonl tokenizer.max_seq_len=64 "
    "model.reduction_factor=4 dtype=fp32 checkpointer.cache_dir={root}/bc"
)


def test_damaged_cache_of_the_backbone_is_quantised_again(at: Path) -> None:
    def run(name: str) -> bytes:
        answer = answer_of(CACHED.format(root=at, name=name), at)
        assert answer.status == 0, answer.text
        return (at / name / "side_network/side_network.safetensors").read_bytes()

    copy_auto(at)
    first = run("first")
    files = list((at / "bc").glob("**/*.safetensors"))
    assert files
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-20_000] + b"\0" * 20_000)
    assert run("second") == first


def test_damaged_cache_of_hidden_states_is_computed_again(at: Path) -> None:
    def run(name: str) -> bytes:
        command = "tune run qst_finetune --config config.yaml epochs=2 hidden_state_cache=hc"
        answer = answer_of(f"{command} output_dir={name}", at)
        assert answer.status == 0, answer.text
        return (at / name / "side_network/side_network.safetensors").read_bytes()

    first = run("first")
    files = list((at / "hc").glob("**/*.safetensors"))
    assert files
    for file in files:
        data = file.read_bytes()
        count = min(len(data) - 2000, 30_000)
        file.write_bytes(data[:-count] + b"\0" * count)
    assert run("zeros") == first
    for file in files:
        states = load_file(file)
        save_file({name: states[name] for name in list(states)[:2]}, file)
    assert run("fewer") == first


# The best checkpoint.


def best_step(run: Path) -> int:
    return json.loads((run / "summary.json").read_text())["best_step"]


def test_damaged_best_checkpoint_is_set_aside_and_not_called_the_best(at: Path) -> None:
    run = at / "run"
    best = best_step(run)
    directory = run / f"checkpoints/step_{best:08}"
    shutil.rmtree(run / "side_network")
    with (directory / "side_network/README.md").open("a") as file:
        file.write("x")
    answer = answer_of("tune run qst_finetune --config config.yaml resume_from_checkpoint=True", at)
    assert answer.status == 0, answer.text
    assert (run / f"checkpoints/damaged_step_{best:08}").is_dir(), answer.text
    assert str(best) in answer.text


# Two runs, one directory.


def test_second_run_in_one_directory_is_refused_and_the_first_ends_well(at: Path) -> None:
    command = "tune run qst_finetune --config config.yaml output_dir=two epochs=30"
    # Its own place for the answer's text, copied before the first run makes and removes files.
    other = copy_of(at, at.parent / "other")
    first = os.fork()
    if first == 0:
        status = 1
        try:
            status = answer_of(command, at, seconds=120).status
        finally:
            os._exit(status)
    try:
        end = time.monotonic() + 60
        while not (at / "two").exists() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3)
        second = answer_of(f"{command.replace('=two', f'={at}/two')} optimizer.lr=0.001", other)
        assert second.status == 2, second.text
        assert len(second.errors) == 1
        status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        first = 0
        assert status == 0
        assert (at / "two/side_network").is_dir()
        assert not list(at.glob("two/checkpoints_before*"))
    finally:
        if first:
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)


# Without permission.

CLOSED = (
    "dataset.data_files",
    "checkpointer.checkpoint_dir",
    "tokenizer.path",
    "hidden_state_cache",
    "output_dir",
)
NOBODY = 65534


@pytest.fixture
def owned(place: Path) -> Iterator[tuple[Path, int | None]]:
    """A copy that an ordinary user owns, and that user, if this is root."""
    with tempfile.TemporaryDirectory() as temporary:
        root = copy_of(place, Path(temporary) / "at")
        if os.getuid() != 0:
            yield root, None
            return
        for path in (Path(temporary), root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        yield root, NOBODY


@pytest.mark.parametrize("key", [*CLOSED, "inspect"])
def test_closed_directory_is_one_line(key: str, owned: tuple[Path, int | None]) -> None:
    root, user = owned
    (root / "closed").mkdir(mode=0)
    command = f"{TRAIN} {key}={{root}}/closed/in/x"
    if key == "inspect":
        command = "sharing inspect closed/in/x"
    answer = answer_of(command.replace("{root}", str(root)), root, user=user)
    (root / "closed").chmod(0o755)
    assert "Traceback" not in answer.text, answer.text
    assert answer.status == 2, answer.text
    assert len(answer.errors) == 1
    assert "closed" in answer.errors[0]
