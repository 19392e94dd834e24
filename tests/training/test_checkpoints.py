"""Checkpoints are whole or absent at every moment, and damaged ones are recognised."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.training.checkpoints import Checkpointing, CheckpointStore
from qst_tune.training.monitor import Monitor
from qst_tune.training.progress import Progress
from tests.support.fake_run import FakeMethod

LOSS = Monitor("val_loss")
FILES = {"state.json": b"{}", "side/weights": b"\x00\x01", "side/config": b"text"}
# What a save does to the disk, in order; each can be the one that fails.
CALLS = [
    *[
        ("fsync", index) for index in range(4 + 2 + 1)
    ],  # files, their directories, the store's directory
    *[("mkdir", index) for index in range(3)],
    ("rename", 0),
]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(10, FILES)
    return store


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def fail_at(call: str, index: int, fail: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let the index-th call fail; those before it, and after it, work."""
    owner = os if call == "fsync" else Path
    original = getattr(owner, call)
    count = iter(range(10**6))

    def wrapped(*args, **kwargs):
        if next(count) == index:
            fail()
        return original(*args, **kwargs)

    patch.setattr(owner, call, wrapped)


def test_checkpoint_holds_its_files(store: CheckpointStore) -> None:
    assert store.newest() == (10, [])
    assert content(store.path(10)) == FILES
    assert [path.name for path in store.directory.iterdir()] == ["step_00000010"]


def test_store_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "nowhere")
    assert store.newest() == (None, [])
    assert store.steps() == []
    assert store.set_all_aside() is None


@pytest.mark.parametrize(("call", "index"), CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full disk", "broken disk"])
def test_write_that_fails_is_reported_and_leaves_the_one_before(
    code: int, call: str, index: int, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        fail_at(call, index, fail, patch)
        with pytest.raises(UserError, match=f"^cannot write .*step_00000020: {os.strerror(code)}$"):
            store.save(20, FILES)
    step, complaints = store.newest()
    assert step is not None
    assert complaints == []
    assert content(store.path(step)) == FILES
    assert not list(store.directory.glob(".*")), "a temporary directory is left"
    if step == 10:  # it failed before the rename, so it can be tried again
        store.save(20, FILES)


@pytest.mark.parametrize(("call", "index"), CALLS)
def test_kill_at_any_moment_of_a_write_leaves_a_checkpoint_that_loads(
    call: str, index: int, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = os.fork()
    if process == 0:
        fail_at(call, index, lambda: os._exit(9), monkeypatch)
        store.save(20, FILES)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    step, complaints = store.newest()
    assert step is not None
    assert complaints == []
    assert content(store.path(step)) == FILES
    if step == 10:
        store.save(20, FILES)
    store.keep_only({20})
    assert [path.name for path in store.directory.iterdir()] == ["step_00000020"]


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_kill_while_deleting_leaves_what_shall_be_kept(
    call: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(20, FILES)
    process = os.fork()
    if process == 0:
        original = shutil.rmtree

        def remove_half(path: Path, ignore_errors: bool) -> None:
            if path.exists():
                (path / "manifest.json").unlink()
                os._exit(9)
            original(path, ignore_errors=ignore_errors)

        if call == "rename":
            fail_at(call, 0, lambda: os._exit(9), monkeypatch)
        else:
            monkeypatch.setattr(shutil, "rmtree", remove_half)
        store.keep_only({20})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert store.newest() == (20, [])
    store.keep_only({20})
    assert [path.name for path in store.directory.iterdir()] == ["step_00000020"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


DAMAGES = {
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "cannot be read"),
    "manifest of nothing": (lambda f: (f / "manifest.json").write_text("3"), "cannot be read"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "cannot be read"),
    "missing file": (lambda f: (f / "side/weights").unlink(), "weights is missing"),
    "missing directory": (lambda f: shutil.rmtree(f / "side"), "weights is missing"),
    "truncated file": (lambda f: truncate(f / "side/weights"), "weights has changed"),
    "flipped bit": (lambda f: flip_a_bit(f / "state.json"), "state.json has changed"),
    "file instead of a directory": (
        lambda f: (shutil.rmtree(f), f.write_text("")),
        "cannot be read",
    ),
    "directory instead of a file": (
        lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(damage: str, store: CheckpointStore) -> None:
    store.save(20, FILES)
    change, expected = DAMAGES[damage]
    change(store.path(20))
    step, (complaint,) = store.newest()
    assert step == 10
    assert complaint.startswith(f"{store.path(20)} is passed over: ")
    assert expected in complaint


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "side/../../x"])
def test_manifest_cannot_lead_out_of_its_directory(name: str, store: CheckpointStore) -> None:
    store.save(20, FILES)
    (store.path(20) / "manifest.json").write_text(f'{{"{name}": "0"}}')
    step, (complaint,) = store.newest()
    assert step == 10
    assert "outside of it" in complaint


def test_damaged_checkpoint_makes_way_and_is_kept(store: CheckpointStore) -> None:
    for _ in range(2):
        store.save(20, FILES)
        store.set_aside(20)
        assert store.steps() == [10]
    names = {path.name for path in store.directory.iterdir()}
    assert names == {"step_00000010", "damaged_step_00000020", "damaged_step_00000020_2"}


def test_checkpoints_of_an_earlier_run_are_set_aside_and_never_lost(store: CheckpointStore) -> None:
    renamed = [store.set_all_aside()]
    store.save(5, FILES)
    renamed.append(store.set_all_aside())
    assert [path and path.name for path in renamed] == [
        "checkpoints_before",
        "checkpoints_before_2",
    ]
    assert store.steps() == []
    assert CheckpointStore(renamed[0]).steps() == [10]


def test_existing_checkpoint_is_never_replaced(store: CheckpointStore) -> None:
    with pytest.raises(UserError, match=r"cannot write .*: it exists, and is never replaced$"):
        store.save(10, {"state.json": b"other"})
    assert content(store.path(10)) == FILES


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda store: store.keep_only({20}), "^cannot delete .*step_00000010: No space left"),
        (lambda store: store.set_aside(10), "^cannot rename .*step_00000010: No space left"),
        (lambda store: store.set_all_aside(), "^cannot rename .*checkpoints: No space left"),
    ],
)
def test_checkpoint_that_cannot_be_moved_is_reported(
    act: Callable[[CheckpointStore], None],
    message: str,
    store: CheckpointStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        fail_at("rename", 0, fail, patch)
        with pytest.raises(UserError, match=message):
            act(store)
    assert store.damage(10) is None


# What a run keeps, and which result the user gets.


def checkpointing(store: CheckpointStore, **changes: Any) -> Checkpointing:
    return Checkpointing(store, {}, steps_per_epoch=6, **changes)


def test_an_epochs_last_step_and_every_nth_are_due(store: CheckpointStore) -> None:
    assert [s for s in range(1, 13) if checkpointing(store).is_due(s)] == [6, 12]
    assert [s for s in range(1, 13) if checkpointing(store, every=4).is_due(s)] == [4, 6, 8, 12]


def test_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    method = FakeMethod(torch.nn.Linear(3, 1))
    for step in (11, 12, 13, 14):
        progress = Progress(step=step, best_step=12)
        checkpointing(store, keep=1).save(method, {}, {}, progress)
    assert store.steps() == [12, 14]


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_damaged_best_is_set_aside_for_the_best_of_the_others(
    higher_is_better: bool, store: CheckpointStore
) -> None:
    sign = -1 if higher_is_better else 1
    figures = {10: 3.0, 20: 1.0, 30: 2.0, 35: 1.5, 40: 2.5}  # 35 has no checkpoint
    figures = {step: sign * figure for step, figure in figures.items()}
    for step in (20, 30, 40):
        store.save(step, FILES)
    for step in (20, 30):
        truncate(store.path(step) / "state.json")
    progress = Progress(step=40, best_step=20, best_value=figures[20], validations_since_best=3)
    notes = checkpointing(store).replace_damaged_best(
        progress, figures, Monitor("figure", higher_is_better)
    )
    assert (progress.best_step, progress.best_value) == (40, figures[40])
    assert progress.validations_since_best == 0
    assert store.steps() == [10, 40]
    assert [note.split(";")[-1] for note in notes] == [
        " step 30 is the next best",
        " step 40 is the next best",
    ]


def test_without_another_validated_checkpoint_there_is_no_best(store: CheckpointStore) -> None:
    (store.path(10) / "manifest.json").unlink()
    progress = Progress(step=10, best_step=10, best_value=1.0)
    (note,) = checkpointing(store).replace_damaged_best(progress, {10: 1.0}, LOSS)
    assert note.endswith("; no other validated step was kept")
    assert (progress.best_step, progress.best_value) == (None, None)


def test_a_checkpoint_that_is_gone_is_damaged_too(store: CheckpointStore) -> None:
    progress = Progress(step=10, best_step=5, best_value=1.0)
    (note,) = checkpointing(store).replace_damaged_best(progress, {5: 1.0, 10: 2.0}, LOSS)
    assert note.endswith("is damaged (manifest.json is missing); step 10 is the next best")


def test_a_whole_best_stays(store: CheckpointStore) -> None:
    progress = Progress(step=10, best_step=10, best_value=1.0)
    assert checkpointing(store).replace_damaged_best(progress, {}, LOSS) == []
    assert progress.best_step == 10
