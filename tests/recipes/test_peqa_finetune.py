"""Tuning scales through the real `tune` and, for what does not need it, the recipe's main()."""

from pathlib import Path

import pytest
import torch
from qst_tune.recipes import peqa_finetune
from safetensors.torch import load_file

from qst_tune.errors import UserError
from qst_tune.models import peqa_llama3_2
from qst_tune.results.tuned_directory import load_tuned
from qst_tune.training.methods import load_peqa
from tests.support.checkpoints import SIZES, Config, file_hashes, finetune_config, write_config
from tests.support.recipe_runs import FinetuneResult, held_out_loss, merged, one_thread, run_tune


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peqa")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    """Three bits, so that there is something to repair."""
    return {
        **finetune_config(root),
        "model": {"_component_": "qst_tune.models.peqa_llama3_2", **SIZES, "bits": 3},
        "enable_activation_checkpointing": True,
    }


@pytest.fixture(scope="module")
def trained(root: Path, config: Config) -> FinetuneResult:
    before = file_hashes(root / "model")
    path = write_config(root / "config.yaml", config)
    result = run_tune("run", "peqa_finetune", "--config", path, "epochs=12", cwd=root)
    assert result.returncode == 0, result.stderr
    assert file_hashes(root / "model") == before, "the base checkpoint was changed"
    return FinetuneResult(root / "run")


def finetune(config: Config, output_dir: Path, *overrides: str) -> FinetuneResult:
    with one_thread():
        peqa_finetune.main(merged(config, f"output_dir={output_dir}", *overrides))
    return FinetuneResult(output_dir)


def scales(run: FinetuneResult) -> dict[str, torch.Tensor]:
    return load_file(run.directory / "scales" / "scales.safetensors")


def test_the_loss_falls_and_the_scales_are_saved(trained: FinetuneResult) -> None:
    assert trained.train_loss[-1] < 0.6 * trained.train_loss[0]
    saved = scales(trained)
    width, kv, inner, layers = 64, 32, 96, 3
    assert sum(s.numel() for s in saved.values()) == layers * (3 * width + 2 * kv + 2 * inner)
    assert trained.summary["trainable_parameters"] == sum(s.numel() for s in saved.values())


def test_the_saved_scales_give_the_held_out_loss_of_the_run_on_a_fresh_model(
    trained: FinetuneResult, config: Config, root: Path
) -> None:
    cfg = merged(config)
    with torch.device("meta"):
        model = peqa_llama3_2(**SIZES, bits=3)
    method = load_peqa(model, cfg, dtype=torch.float32, device=torch.device("cpu"))
    rounded = {name: value.detach().clone() for name, value in model.task().items()}
    load_tuned(trained.directory / "scales", model, backbone=method.provenance.backbone)
    for name, value in scales(trained).items():
        assert torch.equal(model.task()[name], value)
        assert not torch.equal(rounded[name], value)
    # fp32 over rows of other lengths, as in test_lst_config.py.
    expected = trained.held_out_loss[trained.summary["best_step"]]
    assert held_out_loss(model, root) == pytest.approx(expected, rel=2e-6)
    assert expected < trained.held_out_loss[0]


def test_recomputation_in_a_run_changes_nothing(config: Config, tmp_path: Path) -> None:
    runs = [
        finetune(config, tmp_path / str(on), f"enable_activation_checkpointing={on}")
        for on in (True, False)
    ]
    assert torch.equal(runs[0].train_loss, runs[1].train_loss)
    first, second = map(scales, runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16_trains_fp32_scales(config: Config, tmp_path: Path) -> None:
    run = finetune(config, tmp_path / "run", "dtype=bf16", "epochs=6", "model.group_size=32")
    assert run.train_loss[-1] < run.train_loss[0]
    assert all(scale.dtype == torch.float32 for scale in scales(run).values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.bits=5", "model: bits=5 is not supported: use 2, 3, 4, 8"),
        ("model.group_size=0", "model: group_size=0 must be at least 1"),
        ("model._component_=torchtune.models.llama3_2.llama3_2", "does not build a PEQA model"),
        ("enable_activation_offloading=True", "enable_activation_offloading=True is not supported"),
        ("hidden_state_cache=states", "hidden_state_cache=states is for QST: .* set it to null"),
    ],
)
def test_a_mistake_is_named(override: str, message: str, config: Config, tmp_path: Path) -> None:
    if "_component_" in override:
        config = {**config, "model": {**config["model"]}}
        del config["model"]["bits"]
    with pytest.raises(UserError, match=message):
        finetune(config, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()
