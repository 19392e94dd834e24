"""Settings and mistakes of peqa_finetune; what holds for every method is in test_methods.py."""

from pathlib import Path

import pytest
from qst_tune.recipes import peqa_finetune

from qst_tune.errors import UserError
from tests.support.checkpoints import SIZES
from tests.support.methods import METHODS
from tests.support.recipe_runs import merged

PEQA = METHODS["peqa"]


@pytest.mark.parametrize(("group_size", "groups"), [("null", 0), ("32", 32)])
def test_one_scale_a_row_or_one_a_group_is_trained(
    group_size: str, groups: int, tmp_path: Path
) -> None:
    run = PEQA.run(tmp_path, tmp_path / "run", f"model.group_size={group_size}", "dtype=bf16")
    width, kv, inner, layers = 64, 32, 96, SIZES["num_layers"]
    into_width, into_inner = (
        (width // groups, inner // groups) if groups else (1, 1)
    )  # groups of a row of q, k, v, o, gate and up, and of down
    rows = (2 * width + 2 * kv + 2 * inner) * into_width + width * into_inner
    assert run.summary["trainable_parameters"] == layers * rows
    saved = PEQA.tensors(run.directory)
    assert sum(scale.numel() for scale in saved.values()) == layers * rows


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
def test_a_mistake_is_named(override: str, message: str, tmp_path: Path) -> None:
    config = PEQA.config(tmp_path)
    if "_component_" in override:
        del config["model"]["bits"]
    with pytest.raises(UserError, match=message):
        peqa_finetune.main(merged(config, f"output_dir={tmp_path / 'run'}", override))
    assert not (tmp_path / "run").exists()
