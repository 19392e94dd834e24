"""Trials over one backbone are, bit for bit, the runs that they would have been alone."""

import json
import re
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from qst_tune.recipes import qst_evaluate
from safetensors.torch import load_file

from qst_tune.config.schema import TunedModelConfig
from qst_tune.errors import UserError
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.torchtune_backbone import TorchtuneBackbone
from qst_tune.results.loading import load_tuned_model
from tests.support.checkpoints import Config
from tests.support.configs import typed_config
from tests.support.methods import METHODS
from tests.support.nine_steps import RESUME, SETTINGS, nine_steps_config
from tests.support.ranks import finetune_on
from tests.support.recipe_runs import FinetuneResult, finetune, merged, one_thread, val_loss

DIVERGING: dict[str, Any] = {"optimizer.lr": 1e30}
EIGHT: list[dict[str, Any]] = [
    {},
    {"optimizer.lr": 1e-3},
    DIVERGING,
    {"model.reduction_factor": 8, "model.min_head_dim": 4},
    {"model.rank": 2, "model.dropout": 0.2},
    {"model.downsample": "avgpool", "model.num_side_blocks": 1},
    {"seed": 7, "optimizer.weight_decay": 0.5},
    {"lr_scheduler": None, "model.lora_layers": 1, "model.lora_rank": 4, "model.lora_dropout": 0.1},
]


THREE: list[dict[str, Any]] = [{"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-2}, {"seed": 3}]


@pytest.fixture(scope="module")
def nine_steps(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return nine_steps_config(tmp_path_factory.mktemp("nine_steps"))


@pytest.fixture(scope="module")
def whole(nine_steps: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trials, not interrupted."""
    root = Path(nine_steps["checkpointer"]["checkpoint_dir"]).parent
    sweep(nine_steps, root / "whole", THREE, *SETTINGS)
    return root / "whole"


def sweep(config: Config, directory: Path, trials: Any, *overrides: str) -> None:
    finetune({**config, "trials": trials}, directory, *overrides)


def alone(
    config: Config, directory: Path, settings: dict[str, Any], *overrides: str
) -> FinetuneResult:
    raw = merged(config, *overrides)
    for name, value in settings.items():
        OmegaConf.update(raw, name, value, force_add=True)
    if "seed" in settings:
        raw.data_seed = config["seed"]
    plain: Any = OmegaConf.to_container(raw)
    return finetune(plain, directory)


def assert_same(trial: Path, expected: Path) -> None:
    """Every checkpoint: weights, optimizer and history; and the result."""
    steps = sorted(path.name for path in (expected / "checkpoints").iterdir())
    assert sorted(path.name for path in (trial / "checkpoints").iterdir()) == steps
    for step in steps:
        for name in ("side_network/side_network.safetensors", "state.safetensors"):
            file = Path("checkpoints", step, name)
            assert (trial / file).read_bytes() == (expected / file).read_bytes(), (trial, file)
        state, other = (
            json.loads((run / "checkpoints" / step / "state.json").read_text())
            for run in (trial, expected)
        )
        assert state["history"] == other["history"]
        assert state["lr_scheduler"] == other["lr_scheduler"]
    if (expected / "side_network").exists():
        file = Path("side_network/side_network.safetensors")
        assert (trial / file).read_bytes() == (expected / file).read_bytes()


def result_of(directory: Path) -> bytes:
    return (directory / "side_network/side_network.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        ["dtype=fp32"],
        pytest.param(
            ["dtype=bf16", "dataset.packed=True", "enable_activation_checkpointing=True"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_eight_trials_are_the_eight_runs_they_would_have_been(
    settings: list[str], nine_steps: Config, tmp_path: Path
) -> None:
    how = [*SETTINGS, *settings]
    sweep(nine_steps, tmp_path / "sweep", EIGHT, *how)
    for number, own in enumerate(EIGHT, start=1):
        with (
            pytest.raises(UserError, match="the loss is nan") if own is DIVERGING else nullcontext()
        ):
            alone(nine_steps, tmp_path / str(number), own, *how)
        assert_same(tmp_path / "sweep/trials" / str(number), tmp_path / str(number))


def test_each_batch_goes_through_the_backbone_once(
    nine_steps: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, passes = TorchtuneBackbone.run, []
    monkeypatch.setattr(TorchtuneBackbone, "run", lambda *a, **k: passes.append(1) or run(*a, **k))
    finetune(nine_steps, tmp_path / "alone", *SETTINGS)
    of_one = len(passes)
    passes.clear()
    sweep(nine_steps, tmp_path / "sweep", {"grid": {"model.rank": [2, 3, 4]}}, *SETTINGS)
    assert len(passes) == of_one > 9


def test_resuming_goes_on_with_the_trials_that_are_behind(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cut")
    for number, step in enumerate(
        (4, 7, 9), start=1
    ):  # as a kill in the middle of a round leaves it
        trial = tmp_path / "cut/trials" / str(number)
        for path in trial.glob("checkpoints/*"):
            if int(path.name[-8:]) > step:
                shutil.rmtree(path)
    config = nine_steps_config(whole.parent)
    sweep(config, tmp_path / "cut", THREE, *SETTINGS, RESUME)
    for number in ("1", "2", "3"):
        assert_same(tmp_path / "cut/trials" / number, whole / "trials" / number)
    assert result_of(tmp_path / "cut") == result_of(whole)


def test_the_best_trial_is_the_result_with_a_table_and_a_picture(whole: Path) -> None:
    found = json.loads((whole / "trials.json").read_text())
    values = [row["best"] for row in found["trials"]]
    assert found["best"] == values.index(min(values)) + 1
    assert [row["settings"] for row in found["trials"]] == THREE
    assert result_of(whole) == result_of(whole / "trials" / str(found["best"]))
    table = (whole / "trials.md").read_text()
    assert f"| 2 | 0.01 |  | {values[1]:.4f} |" in table
    assert (whole / "trials.png").stat().st_size > 10_000


def test_only_the_better_half_goes_on_also_when_it_resumes(
    nine_steps: Config, tmp_path: Path
) -> None:
    lr = {"optimizer.lr": [1e-2, 1e-5, 3e-2, 1e-6]}
    block = {"grid": lr, "halving": {"first_step": 2}}
    how = [*SETTINGS, "lr_scheduler=null"]
    sweep(nine_steps, tmp_path / "run", block, *how)
    rows = json.loads((tmp_path / "run/trials.json").read_text())["trials"]
    assert sorted(row["steps"] for row in rows) == [2, 2, 4, 9]
    assert [rows[n]["steps"] for n in (1, 3)] == [2, 2], "the small rates"
    assert rows[3]["end"].startswith("given up: val_loss")
    best = next(row for row in rows if row["steps"] == 9)
    alone(nine_steps, tmp_path / "alone", best["settings"], *how)
    assert_same(tmp_path / "run/trials" / str(best["trial"]), tmp_path / "alone")
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / f"cut/trials/{best['trial']}/checkpoints/step_00000009")
    sweep(nine_steps, tmp_path / "cut", block, *how, RESUME)
    again = json.loads((tmp_path / "cut/trials.json").read_text())["trials"]
    assert [row["steps"] for row in again] == [row["steps"] for row in rows]
    assert result_of(tmp_path / "cut") == result_of(tmp_path / "run")


REFUSED = {
    "a key of the backbone": ({"grid": {"model.base_quantization": ["nf4"]}}, "is of the backbone"),
    "a key of the batches": ({"grid": {"batch_size": [1, 2]}}, "batch_size is of the batches"),
    "a misspelt key": ({"grid": {"optimiser.lr": [1]}}, "is no key; did you mean 'optimizer"),
    "no trials": ([], "trials.list is empty"),
    "the same trial twice": ([{"seed": 1}, {"seed": 1}], "1 and 2 are the same (seed=1)"),
    "an unknown choice": ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'?"),
    "a value of no use": ([{"model.rank": "x"}], 'trial 1 (model.rank="x"): model.rank=x must be'),
    "a shape of no use": (
        [{}, {"model.num_side_blocks": 9}],
        "trial 2 (model.num_side_blocks=9): model: num_side_blocks=9 must be from 0 to",
    ),
    "a step without validation": (
        {"grid": {"seed": [1, 2]}, "halving": {"first_step": 5}},
        "first_step=5 must be a step after which trials validate: set run_val_every_n_steps=5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_trials_that_cannot_be_are_refused_in_one_line(
    case: str, nine_steps: Config, tmp_path: Path
) -> None:
    block, expected = REFUSED[case]
    with pytest.raises(UserError) as error:
        sweep(nine_steps, tmp_path / "run", block, *SETTINGS)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_trial_that_has_become_another_is_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    changed = [THREE[0], {"optimizer.lr": 2e-2}, THREE[2]]
    with pytest.raises(
        UserError, match=r"trial 2: cannot resume with optimizer\.lr: 0\.01 when saved"
    ):
        sweep(nine_steps_config(whole.parent), tmp_path / "run", changed, *SETTINGS, RESUME)


def test_trials_need_a_seed_and_a_validation_set(nine_steps: Config, tmp_path: Path) -> None:
    for override, expected in {
        "seed=null": "need seed",
        "dataset_val=null": "need a validation",
    }.items():
        with pytest.raises(UserError, match=expected):
            sweep(nine_steps, tmp_path / "run", THREE, override)


@pytest.mark.parametrize(
    "name", ["classifier", "dpo", pytest.param("repaired", marks=pytest.mark.slow)]
)
def test_every_task_has_trials(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    trials = {"grid": {"optimizer.lr": [1e-2, 1e-3]}}
    varied = replace(method, config=lambda root: {**method.config(root), "trials": trials})
    varied.run(tmp_path, tmp_path / "sweep", "epochs=2", "seed=0")
    for number, lr in enumerate((1e-2, 1e-3), start=1):
        run = method.run(
            tmp_path, tmp_path / str(number), "epochs=2", "seed=0", f"optimizer.lr={lr}"
        )
        assert_same(tmp_path / "sweep/trials" / str(number), run.directory)


def test_a_start_and_its_reference_differ_from_trial_to_trial(tmp_path: Path) -> None:
    method = METHODS["dpo"]
    starts = [method.run(tmp_path, tmp_path / f"start{n}", "epochs=1", f"seed={n}") for n in (1, 2)]
    trials = [{"side_network": str(run.directory / "side_network")} for run in starts]
    varied = replace(method, config=lambda root: {**method.config(root), "trials": trials})
    varied.run(tmp_path, tmp_path / "sweep", "epochs=2", "seed=0")
    for number, own in enumerate(trials, start=1):
        run = method.run(
            tmp_path,
            tmp_path / str(number),
            "epochs=2",
            "seed=0",
            f"side_network={own['side_network']}",
        )
        assert_same(tmp_path / "sweep/trials" / str(number), run.directory)


def test_kept_states_on_disk_are_read_once_a_batch(
    nine_steps: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"hidden_state_cache={tmp_path / 'states'}"
    trials = [{"model.num_side_blocks": 1}, {"model.num_side_blocks": 3}, {"model.lora_layers": 1}]
    run, reads = HiddenStateCache.run, []
    monkeypatch.setattr(HiddenStateCache, "run", lambda *a, **k: reads.append(1) or run(*a, **k))
    sweep(nine_steps, tmp_path / "sweep", trials, *SETTINGS, cache)
    of_three = len(reads)
    reads.clear()
    alone(nine_steps, tmp_path / "1", trials[0], *SETTINGS, cache)
    assert len(reads) == of_three
    for number, own in enumerate(trials[1:], start=2):
        alone(nine_steps, tmp_path / str(number), own, *SETTINGS, cache)
    for number in ("1", "2", "3"):
        assert_same(tmp_path / "sweep/trials" / number, tmp_path / number)


@pytest.mark.parametrize("sharding", ["full", pytest.param("null", marks=pytest.mark.slow)])
def test_two_processes_have_the_trials_of_two_processes(
    sharding: str, nine_steps: Config, tmp_path: Path
) -> None:
    trials: list[dict[str, Any]] = [{"optimizer.lr": 1e-3}, DIVERGING, {"model.lora_layers": 1}]
    how = [*SETTINGS, f"backbone_sharding={sharding}", "gradient_accumulation_steps=1", "epochs=2"]
    finetune_on(2, {**nine_steps, "trials": trials}, tmp_path / "sweep", *how)
    for number in (1, 3):
        settings = [f"{name}={value}" for name, value in trials[number - 1].items()]
        finetune_on(2, nine_steps, tmp_path / str(number), *how, *settings)
        assert_same(tmp_path / "sweep/trials" / str(number), tmp_path / str(number))
    rows = json.loads((tmp_path / "sweep/trials.json").read_text())["trials"]
    assert rows[1]["end"].startswith("failed: step")


def test_evaluation_measures_all_trials_over_one_pass(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("the colour of box is what it is " * 20)
    run, passes = TorchtuneBackbone.run, []
    monkeypatch.setattr(TorchtuneBackbone, "run", lambda *a, **k: passes.append(1) or run(*a, **k))
    config = {
        **nine_steps_config(whole.parent),
        "output_dir": str(whole),
        "text": str(tmp_path / "text.txt"),
    }

    def measured(**changes: Any) -> dict[str, dict[str, float]]:
        passes.clear()
        with one_thread():
            qst_evaluate.main(merged({**config, **changes}))
        return json.loads((whole / "evaluation.json").read_text())

    together = measured(trials=THREE)
    assert list(together)[2] == "trial 2 (optimizer.lr=0.01)"
    num_passes = len(passes)
    best = [row["best"] for row in json.loads((whole / "trials.json").read_text())["trials"]]
    for number, own in enumerate(list(together)[1:], start=1):
        name = str(whole / "trials" / str(number) / "side_network")
        (base, alone) = measured(side_network=name).values()
        assert together[own] == alone
        assert together["quantised base model"] == base
        assert alone["validation loss"] == best[number - 1]
        assert len(passes) == num_passes, "of the base and of one network"


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([5e-2, 4e-2, 3e-2], "the mean of trials 3, 2"),
        ([1e-1, 1.2e-1], "the mean of trial 2 at steps 9, 8, 7"),
    ],
)
def test_a_soup_that_is_better_is_the_mean_and_the_result(
    rates: list[float], expected: str, nine_steps: Config, tmp_path: Path
) -> None:
    block = {"grid": {"optimizer.lr": rates}, "soup": True}
    sweep(nine_steps, tmp_path / "run", block, *SETTINGS, "lr_scheduler=null")
    found = json.loads((tmp_path / "run/trials.json").read_text())
    assert found["soup"]["of"] == expected
    assert found["soup"]["val_loss"] < min(row["best"] for row in found["trials"])
    run = tmp_path / "run/trials"
    paths = {
        3: [run / "3", run / "2"],
        2: [run / f"2/checkpoints/step_0000000{step}" for step in (9, 8, 7)],
    }[len(rates)]
    each = [load_file(path / "side_network/side_network.safetensors") for path in paths]
    for name, value in FinetuneResult(tmp_path / "run").weights.items():
        mean = sum(tensors[name].double() for tensors in each) / len(each)
        torch.testing.assert_close(value, mean.float(), rtol=1e-7, atol=0)
    loaded = load_tuned_model(
        typed_config(
            merged(
                {
                    **nine_steps,
                    "output_dir": str(tmp_path / "run"),
                    "side_network": str(tmp_path / "run/side_network"),
                },
            ),
            TunedModelConfig,
        )
    )
    root = Path(nine_steps["checkpointer"]["checkpoint_dir"]).parent
    assert val_loss(loaded.model, root) == pytest.approx(found["soup"]["val_loss"], rel=1e-5)


def test_a_signal_stops_all_trials_and_they_resume_bit_for_bit(
    nine_steps: Config, tmp_path: Path
) -> None:
    """The eighth pass is the second trial's, in the middle of the second step."""
    marker = tmp_path / "marker"
    call = 3 * 2 * 2 + 3 * 2 + 3  # validation, the first step, then half a round
    loss = ["loss._component_=tests.support.faults.SignalledLoss", f"loss.marker={marker}"]
    how = [*SETTINGS, *loss, f"loss.call={call}", "loss.signal_name=SIGTERM", "batch_size_val=4"]
    with pytest.raises(SystemExit) as stopped:
        sweep(nine_steps, tmp_path / "run", THREE, *how)
    assert stopped.value.code == 128 + signal.SIGTERM
    rows = json.loads((tmp_path / "run/trials.json").read_text())["trials"]
    assert [row["end"] for row in rows] == ["interrupted"] * 3
    assert {row["steps"] for row in rows} <= {1, 2, 3}
    sweep(nine_steps, tmp_path / "run", THREE, *how, RESUME)
    sweep(nine_steps, tmp_path / "whole", THREE, *how)  # the marker is there
    for number in ("1", "2", "3"):
        assert_same(tmp_path / "run/trials" / number, tmp_path / "whole/trials" / number)


def test_a_trial_that_stops_early_leaves_the_others_alone(
    nine_steps: Config, tmp_path: Path
) -> None:
    trials = [{"optimizer.lr": 3e-1}, {"optimizer.lr": 1e-2}]
    how = [*SETTINGS, "early_stopping_patience=1", "lr_scheduler=null"]
    sweep(nine_steps, tmp_path / "run", trials, *how)
    rows = json.loads((tmp_path / "run/trials.json").read_text())["trials"]
    assert [row["end"] for row in rows] == ["stopped early", "finished"]
    for number, own in enumerate(trials, start=1):
        alone(nine_steps, tmp_path / str(number), own, *how)
        assert_same(tmp_path / "run/trials" / str(number), tmp_path / str(number))


def test_if_all_trials_fail_the_reason_is_told(nine_steps: Config, tmp_path: Path) -> None:
    trials = [DIVERGING, {"optimizer.lr": 1e31}]
    with pytest.raises(UserError, match="step 3: the loss is nan"):
        sweep(nine_steps, tmp_path / "run", trials, *SETTINGS)
    assert not (tmp_path / "run/side_network").exists()


def test_a_dry_run_says_what_all_of_them_take_and_writes_nothing(
    nine_steps: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(nine_steps, tmp_path / "run", THREE, *SETTINGS, "dry_run=True")
    printed = capsys.readouterr().out
    assert "dry run: 9 steps in 3 epochs" in printed
    assert re.search(r"3 trials: peak 0\.\d\d GiB, [12]\.\d\d times the operations of", printed)
    assert not (tmp_path / "run").exists()
