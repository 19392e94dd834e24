"""What holds for every method: it learns, saves, loads, resumes, and starts from what was tuned.

A method is a row of :data:`tests.support.methods.METHODS`; a new one needs no test of its own here.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file

from qst_tune.errors import UserError
from qst_tune.results.start import digest_of
from qst_tune.training.checkpoints import CheckpointStore
from tests.support.checkpoints import file_hashes, write_config
from tests.support.methods import METHODS, Method
from tests.support.quantised import quantised_backbone
from tests.support.recipe_runs import FinetuneResult, run_tune, tune_here, val_loss

SETTINGS = [
    "epochs=3",
    "clip_grad_norm=1.0",
    "save_every_n_steps=1",
    "keep_last_n_checkpoints=100",
    "lr_scheduler._component_=qst_tune.training.lr_schedulers.cosine_with_warmup",
    "lr_scheduler.num_warmup_steps=1",
]
RESUME = "resume_from_checkpoint=True"


@dataclass(frozen=True)
class Trained:
    """One run of a method that all tests here look at, and never write to."""

    method: Method
    root: Path
    run: FinetuneResult

    @property
    def result(self) -> Path:
        return self.run.directory / self.method.result

    def again(self, directory: Path, *overrides: str) -> FinetuneResult:
        return self.method.run(self.root, directory, *SETTINGS, *overrides)

    def has_same_bits(self, other: FinetuneResult) -> bool:
        ours, theirs = (self.method.tensors(run.directory) for run in (self.run, other))
        equal = all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
        histories = ("train_loss", "val_loss", "metrics")
        return equal and all(self.run.summary[k] == other.summary[k] for k in histories)


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, marks=pytest.mark.slow if m.slow else ()) for m in METHODS.values()],
    ids=METHODS,
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    method: Method = request.param
    root = tmp_path_factory.mktemp(method.name)
    method.config(root)  # writes the model and the data
    before = file_hashes(root / "model")
    run = method.run(root, root / "first", *SETTINGS)
    assert file_hashes(root / "model") == before, "the base checkpoint was changed"
    return Trained(method, root, run)


# It learns.


def test_losses_fall(trained: Trained) -> None:
    losses, validation = trained.run.train_loss, trained.run.val_loss
    steps = len(losses)
    assert losses.isfinite().all()
    assert losses[-2:].mean() < 0.9 * losses[0]
    assert list(validation) == [0, steps // 3, 2 * steps // 3, steps]
    assert validation[steps] < 0.95 * validation[0]


def test_the_first_validation_loss_is_that_of_the_base_model(trained: Trained) -> None:
    base = trained.method.load(trained.root, None)
    assert not base.is_tuned
    expected = trained.method.loss_of(base, trained.root)
    # fp32 over batches that are padded, and one example at a time: measured 2e-7.
    assert trained.run.val_loss[0] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", ["qst", "lst"])
def test_the_base_model_is_torchtunes_own_decoder(name: str, tmp_path: Path) -> None:
    """Its weights are quantised and decoded by torchao, or not at all, not by us."""
    METHODS[name].config(tmp_path)
    expected = val_loss(quantised_backbone(tmp_path / "model", name == "qst"), tmp_path)
    base = METHODS[name].load(tmp_path, None)
    assert METHODS[name].loss_of(base, tmp_path) == pytest.approx(expected, rel=2e-6)


# What it saves.


def test_result_is_a_directory_of_the_documented_files(trained: Trained) -> None:
    method = trained.method
    files = {f"{method.result}.safetensors", "recipe_config.yaml", "README.md"}
    files |= {"peqa_config.json"} if method.result == "scales" else {"qst_config.json"}
    files |= {"config.json"} if method.result == "side_network" else set()
    files |= {"peft"} if method.name == "lora" else set()
    assert {path.name for path in trained.result.iterdir()} == files
    recorded = OmegaConf.load(trained.result / "recipe_config.yaml")
    assert recorded.epochs == 3
    assert recorded.checkpointer.output_dir == str(trained.run.directory)
    expected = {"lst": "none", "peqa": "int3, per channel, rtn"}.get(method.name, "nf4")
    backbone = method.description(trained.run.directory)["backbone"]
    assert backbone["quantization"].startswith(expected)


def test_only_what_was_trained_is_saved_in_fp32(trained: Trained) -> None:
    tensors = trained.method.tensors(trained.run.directory)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    count = sum(tensor.numel() for tensor in tensors.values())
    assert count == trained.run.summary["trainable_parameters"]
    with safe_open(trained.result / f"{trained.method.result}.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_nothing_that_a_run_leaves_is_a_pickle(trained: Trained) -> None:
    files = [path for path in trained.run.directory.rglob("*") if path.is_file()]
    assert any("checkpoints" in path.parts for path in files)
    for file in files:
        assert file.suffix not in (".pt", ".pth", ".bin", ".pkl", ".ckpt")
        if file.suffix == ".safetensors":
            # Its first byte, of the header's length, may be that of a pickle.
            safe_open(file, "pt").__enter__()
        else:  # a zip holds torch's pickles; protocol 2 and above start with 0x80
            assert not file.read_bytes().startswith((b"PK\x03\x04", b"\x80"))


# What it loads.


def test_the_loaded_result_has_the_validation_loss_of_the_run(trained: Trained) -> None:
    tuned = trained.method.load(trained.root, trained.result)
    best = trained.run.val_loss[trained.run.summary["best_step"]]
    assert tuned.is_tuned
    assert trained.method.loss_of(tuned, trained.root) == pytest.approx(best, rel=2e-6)


def test_the_result_of_another_kind_is_refused(trained: Trained) -> None:
    own = trained.method.config(trained.root)["model"]
    for other in METHODS.values():
        if other.config(trained.root)["model"] == own:  # DPO tunes the same model
            continue
        with pytest.raises(UserError) as error:
            other.load(trained.root, trained.result)
        assert len(str(error.value).splitlines()) == 1


# The same run again.


def test_same_seed_gives_the_same_bits_and_another_seed_others(
    trained: Trained, tmp_path: Path
) -> None:
    assert trained.has_same_bits(trained.again(tmp_path / "same"))
    assert not trained.has_same_bits(trained.again(tmp_path / "other", "seed=1"))


def test_recomputing_activations_changes_nothing(trained: Trained, tmp_path: Path) -> None:
    """Sums run in one order, so that even the bits are equal."""
    run = trained.again(tmp_path / "run", "enable_activation_checkpointing=True")
    assert trained.has_same_bits(run)


def test_in_bf16_the_trained_tensors_stay_fp32(trained: Trained, tmp_path: Path) -> None:
    run = trained.again(tmp_path / "run", "dtype=bf16")
    tensors = trained.method.tensors(run.directory)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert run.train_loss[-1] < run.train_loss[0]


# Resuming.


def cut(run: FinetuneResult, result: str, directory: Path, step: int) -> Path:
    """A copy of a run's directory as it was after a step."""
    shutil.copytree(run.directory, directory)
    shutil.rmtree(directory / result)
    (directory / "summary.json").unlink()
    for later in CheckpointStore(directory / "checkpoints").steps():
        if later > step:
            shutil.rmtree(directory / "checkpoints" / f"step_{later:08}")
    return directory


def test_run_that_is_resumed_is_bit_identical(trained: Trained, tmp_path: Path) -> None:
    last = len(trained.run.train_loss)
    for step in (1, last // 2, last):
        directory = cut(trained.run, trained.method.result, tmp_path / str(step), step)
        assert trained.has_same_bits(trained.again(directory, RESUME))


def test_another_model_or_other_rows_are_refused(trained: Trained, tmp_path: Path) -> None:
    directory = cut(trained.run, trained.method.result, tmp_path / "run", 2)
    change = "model.group_size=32" if trained.method.name == "peqa" else "model.rank=8"
    for override in (change, "dataset.split='train[1:]'", "seed=7"):
        with pytest.raises(UserError, match=r"cannot resume with"):
            trained.again(directory, RESUME, override)
    assert CheckpointStore(directory / "checkpoints").steps() == [1, 2], "nothing is lost"


# Starting from what was tuned.


def from_result(trained: Trained) -> list[str]:
    return [f"{trained.method.result}={trained.result}", "optimizer.lr=1e-3"]


def test_run_starts_where_the_other_ended_and_records_it(trained: Trained, tmp_path: Path) -> None:
    first = trained.run
    second = trained.again(tmp_path / "second", *from_result(trained))
    if "dpo" in trained.method.name:  # the start is its own reference
        assert second.val_loss[0] == pytest.approx(0.6931, abs=1e-4)
    else:
        assert second.val_loss[0] == first.val_loss[first.summary["best_step"]]
    assert first.summary["before"] == "quantised base model"
    assert second.summary["before"] == "start"
    assert "lineage" not in trained.method.description(first.directory)
    (entry,) = trained.method.description(second.directory)["lineage"]
    assert entry["name"] == f"first/{trained.method.result}"
    assert entry["digest"] == digest_of(trained.method.tensors(first.directory))
    assert entry["steps"] == first.summary["best_step"]
    card = (second.directory / trained.method.result / "README.md").read_text()
    assert f"`{entry['digest'][:16]}...`" in card


def test_run_that_started_from_a_result_resumes_to_the_bit(
    trained: Trained, tmp_path: Path
) -> None:
    result = trained.method.result
    start = shutil.copytree(trained.result, tmp_path / "start" / result)
    settings = [f"{result}={start}", "optimizer.lr=1e-3"]
    whole = trained.again(tmp_path / "whole", *settings)
    directory = cut(whole, result, tmp_path / "cut", len(whole.train_loss) // 2)
    resumed = trained.again(directory, *settings, RESUME)
    assert Trained(trained.method, trained.root, whole).has_same_bits(resumed)
    with pytest.raises(UserError, match=r"cannot resume with .*: .* the run started"):
        trained.again(directory, *settings, RESUME, f"{result}=null")
    changed = {name: w + 1 for name, w in trained.method.tensors(start.parent).items()}
    weights, description = start / f"{result}.safetensors", next(start.glob("*_config.json"))
    save_file(changed, weights)
    with pytest.raises(UserError, match=r"has another SHA-256 than .*_config\.json says"):
        trained.again(directory, *settings, RESUME)
    content = json.loads(description.read_text())
    content["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    description.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the tensors of .*, which it started from, have chan"):
        trained.again(directory, *settings, RESUME)


def test_result_of_another_method_is_no_start(trained: Trained, tmp_path: Path) -> None:
    wrong = "side_network" if trained.method.result == "scales" else "scales"
    with pytest.raises(UserError, match=f"{wrong}=x is what .* use {trained.method.result}"):
        trained.again(tmp_path / "run", f"{wrong}=x")
    assert not (tmp_path / "run").exists()


# Before and besides a run.


def test_dry_run_reports_the_run_and_writes_nothing(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_hashes(trained.root)
    trained.method.run(trained.root, tmp_path / "run", *SETTINGS, "dry_run=True")
    assert f"dry run: {len(trained.run.train_loss)} steps in 3 epochs" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert file_hashes(trained.root) == before


@pytest.mark.parametrize(
    "name", ["qst", *(pytest.param(name, marks=pytest.mark.slow) for name in ("peqa", "dpo"))]
)
def test_tune_runs_a_users_copy_of_the_recipe_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """With a line of the user's own, where `tune cp` puts it."""
    method = METHODS[name]
    path = write_config(tmp_path / "config.yaml", method.config(tmp_path))
    recipe = method.recipe.__name__.rpartition(".")[2]
    tune_here("cp", recipe, "mine.py", cwd=tmp_path)
    copy, begin = tmp_path / "mine.py", '    """Run the recipe."""\n'
    assert begin in copy.read_text()
    copy.write_text(copy.read_text().replace(begin, f'{begin}    print("my own line")\n'))
    result = run_tune("run", "mine.py", "--config", path, *SETTINGS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("my own line\n")
    assert "validation loss, quantised base model: " in result.stdout
    run = FinetuneResult(tmp_path / "run")
    inside = method.run(tmp_path, tmp_path / "inside", *SETTINGS)
    assert Trained(method, tmp_path, run).has_same_bits(inside)
