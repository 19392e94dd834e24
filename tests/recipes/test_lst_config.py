"""LST is QST without quantisation: its config trains over the checkpoint's own weights."""

import json
from pathlib import Path

import pytest
from torchtune.models import convert_weights
from torchtune.models.llama3_2 import llama3_2

from tests.support.checkpoints import SIZES, finetune_config, read_checkpoint
from tests.support.recipe_runs import FinetuneResult, held_out_loss, run_tune


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lst")


@pytest.fixture(scope="module")
def trained(root: Path) -> FinetuneResult:
    """The shipped config, over a tiny model instead of SmolLM2, through `tune run`."""
    finetune_config(root)  # writes model and data
    result = run_tune(
        *("run", "qst_finetune", "--config", "smollm2/135M_lst", f"cache={root}"),
        "model._component_=qst_tune.models.qst_llama3_2",
        *(f"model.{name}={value}" for name, value in SIZES.items()),
        "model.reduction_factor=4",
        f"checkpointer.checkpoint_dir={root / 'model'}",
        f"dataset.data_files={root / 'train.jsonl'}",
        f"dataset_val.data_files={root / 'val.jsonl'}",
        *("dtype=fp32", "batch_size=4", "epochs=12", "lr_scheduler.num_warmup_steps=2"),
        "tokenizer.max_seq_len=64",
        cwd=root,
    )
    assert result.returncode == 0, result.stderr
    return FinetuneResult(root / "runs" / "135M_lst")


def test_the_first_loss_is_that_of_the_unquantised_model(trained: FinetuneResult, root: Path):
    backbone = llama3_2(**SIZES)
    heads, kv_heads = SIZES["num_heads"], SIZES["num_kv_heads"]
    weights = read_checkpoint(root / "model")
    backbone.load_state_dict(
        convert_weights.hf_to_tune(
            weights, num_heads=heads, num_kv_heads=kv_heads, dim=SIZES["embed_dim"]
        )
    )
    # fp32 over rows of other lengths: measured 2e-7 for the quantised model's twin of this test.
    assert trained.held_out_loss[0] == pytest.approx(held_out_loss(backbone, root), rel=2e-6)


def test_it_learns(trained: FinetuneResult):
    assert trained.train_loss[-4:].mean() < 0.8 * trained.train_loss[0]


def test_the_directory_says_that_the_backbone_is_not_quantised(trained: FinetuneResult):
    description = json.loads((trained.weights_file.parent / "qst_config.json").read_text())
    assert description["backbone"]["quantization"] == "none"
    assert description["model"]["quantize_base"] is False
