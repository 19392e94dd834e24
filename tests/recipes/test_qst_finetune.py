"""Settings of qst_finetune; what holds for every method is in test_methods.py."""

import shutil
from pathlib import Path

import pytest
import torch
import torchtune
from omegaconf import OmegaConf

from qst_tune.modules.side.config import VARIANTS
from qst_tune.modules.torchtune_backbone import TorchtuneBackbone
from tests.support.checkpoints import (
    LLAMA3_SIZES,
    Config,
    colour_rows,
    finetune_config,
    write_checkpoint,
    write_config,
    write_jsonl,
    write_tiktoken,
)
from tests.support.recipe_runs import FinetuneResult, finetune, run_tune, tune_here

# fp32 sums in another order: measured 1e-6 in losses of 7, and 3e-8 in the weights.
LOSS_CLOSE = {"rtol": 1e-6, "atol": 0.0}
WEIGHTS_CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return finetune_config(root)


@pytest.fixture(scope="module")
def sgd_config(config: Config) -> Config:
    """Three steps in file order, without a validation set.

    Under SGD the weights are linear in the gradients, so sums in another order stay close; AdamW
    divides each gradient by its own size, and would magnify the rounding of one near zero.
    """
    return {
        **config,
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1},
        "dataset_val": None,
        "shuffle": False,
        "batch_size": 2,
        "max_steps_per_epoch": 3,
    }


@pytest.fixture(scope="module")
def plain_sgd(sgd_config: Config, root: Path) -> FinetuneResult:
    """What variations that must not change the result are compared with: batches of 2."""
    return finetune(sgd_config, root / "plain_sgd")


@pytest.fixture(scope="module")
def batch_of_four(sgd_config: Config, root: Path) -> FinetuneResult:
    return finetune(
        sgd_config, root / "batch_of_four", "batch_size=4", "epochs=2", "max_steps_per_epoch=null"
    )


def assert_same_run(actual: FinetuneResult, expected: FinetuneResult) -> None:
    torch.testing.assert_close(actual.train_loss, expected.train_loss, **LOSS_CLOSE)
    torch.testing.assert_close(actual.weights, expected.weights, **WEIGHTS_CLOSE)


def test_run_that_writes_over_an_earlier_one_replaces_its_side_network(
    plain_sgd: FinetuneResult, sgd_config: Config, tmp_path: Path
) -> None:
    shutil.copytree(plain_sgd.directory, tmp_path / "run")
    run = finetune(sgd_config, tmp_path / "run", "seed=1")
    assert run.weights_file.read_bytes() != plain_sgd.weights_file.read_bytes()
    # No temporary directory is left beside it, and the earlier run's checkpoints are kept.
    names = {path.name for path in run.directory.iterdir() if path.is_dir()}
    assert names == {"side_network", "logs", "checkpoints", "checkpoints_before"}


# The same result in other ways.


def test_accumulating_two_batches_of_two_equals_a_batch_of_four(
    batch_of_four: FinetuneResult, sgd_config: Config, tmp_path: Path
) -> None:
    run = finetune(
        sgd_config,
        tmp_path / "run",
        "gradient_accumulation_steps=2",
        "epochs=2",
        "max_steps_per_epoch=null",
    )
    assert_same_run(run, batch_of_four)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(
    batch_of_four: FinetuneResult, sgd_config: Config, root: Path, tmp_path: Path
) -> None:
    # The sampler deals rows 0, 2, 4.. and 1, 3, 5..: two batches of 2 are rows 0 to 3 together.
    held_out = finetune_config(root)["dataset_val"]  # 5 rows: an odd number for two processes
    path = write_config(tmp_path / "config.yaml", {**sgd_config, "dataset_val": held_out})
    result = run_tune(
        "run",
        "--nproc_per_node",
        "2",
        "qst_finetune",
        "--config",
        path,
        f"output_dir={tmp_path / 'run'}",
        "epochs=2",
        "max_steps_per_epoch=null",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    run = FinetuneResult(tmp_path / "run")
    assert_same_run(run, batch_of_four)
    assert result.stdout.count("validation loss, quantised base model") == 1, (
        "a rank too many speaks"
    )
    alone = finetune(
        sgd_config | {"dataset_val": held_out}, tmp_path / "alone", "max_steps_per_epoch=1"
    )
    assert run.val_loss[0] == pytest.approx(alone.val_loss[0], rel=1e-6)


@pytest.mark.parametrize(
    "loss", ["torchtune.modules.loss.CEWithChunkedOutputLoss", "torch.nn.CrossEntropyLoss"]
)
def test_other_losses_give_the_same_run(
    loss: str, plain_sgd: FinetuneResult, sgd_config: Config, tmp_path: Path
) -> None:
    run = finetune(sgd_config, tmp_path / "run", f"loss._component_={loss}")
    assert_same_run(run, plain_sgd)


def test_activation_checkpointing_gives_the_same_run_and_keeps_less(
    plain_sgd: FinetuneResult, sgd_config: Config, tmp_path: Path
) -> None:
    run = finetune(sgd_config, tmp_path / "run", "enable_activation_checkpointing=True")
    assert_same_run(run, plain_sgd)
    kept = "activations kept"
    assert run.summary["memory_gib"][kept] < plain_sgd.summary["memory_gib"][kept] / 2


def test_kept_hidden_states_give_the_same_run_without_the_backbone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run keeps them, in two epochs; the second has nothing left to compute."""
    settings = ["epochs=2", f"hidden_state_cache={tmp_path / 'states'}", "dtype=bf16"]
    first = finetune(config, tmp_path / "first", *settings)
    ran = []
    frozen = TorchtuneBackbone._frozen
    monkeypatch.setattr(
        TorchtuneBackbone,
        "_frozen",
        lambda self, m, x, **r: ran.append(m) or frozen(self, m, x, **r),
    )
    second = finetune(config, tmp_path / "second", *settings)
    assert torch.equal(second.train_loss, first.train_loss)
    assert all(torch.equal(second.weights[name], first.weights[name]) for name in first.weights)
    assert second.val_loss == first.val_loss
    assert ran
    assert all(isinstance(module, torch.nn.Embedding) for module in ran)


def test_first_epoch_of_a_run_that_keeps_hidden_states_is_that_of_any_run(
    config: Config, tmp_path: Path
) -> None:
    kept = finetune(config, tmp_path / "kept", "epochs=1", f"hidden_state_cache={tmp_path / 's'}")
    plain = finetune(config, tmp_path / "plain", "epochs=1")
    assert torch.equal(kept.train_loss, plain.train_loss)
    assert kept.val_loss == plain.val_loss


@pytest.mark.parametrize(
    "change", ["model.base_quantization=int8", "model.num_side_blocks=2", "dtype=bf16"]
)
def test_what_another_backbone_or_other_layers_gave_is_not_read(
    change: str, config: Config, tmp_path: Path
) -> None:
    kept = f"hidden_state_cache={tmp_path / 'states'}"
    finetune(config, tmp_path / "before", "epochs=1", kept)
    run = finetune(config, tmp_path / "kept", "epochs=1", kept, change)
    plain = finetune(config, tmp_path / "plain", "epochs=1", change)
    assert torch.equal(run.train_loss, plain.train_loss)
    assert len(list((tmp_path / "states").iterdir())) == 2


@pytest.mark.slow  # compiles each layer: about 100 s
def test_compile_gives_the_same_run(
    plain_sgd: FinetuneResult, sgd_config: Config, tmp_path: Path
) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    assert_same_run(finetune(sgd_config, tmp_path / "run", "compile=True"), plain_sgd)


# Settings.


@pytest.mark.parametrize("downsample", ["linear", "lora", "adapter", "maxpool", "avgpool"])
def test_every_downsampler_trains(downsample: str, config: Config, tmp_path: Path) -> None:
    run = finetune(config, tmp_path / "run", f"model.downsample={downsample}", "epochs=4")
    assert run.train_loss[-2:].mean() < run.train_loss[:2].mean() * 0.8


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(variant: str, config: Config, tmp_path: Path) -> None:
    run = finetune(config, tmp_path / "run", f"model.variant={variant}", "epochs=4")
    assert run.train_loss[-2:].mean() < run.train_loss[:2].mean()
    assert run.val_loss[8] < run.val_loss[0]


def test_bf16_follows_fp32(plain_sgd: FinetuneResult, sgd_config: Config, tmp_path: Path) -> None:
    run = finetune(sgd_config, tmp_path / "run", "dtype=bf16")
    # bf16 has 8 bits of precision; measured 1.7 % after two steps.
    torch.testing.assert_close(run.train_loss, plain_sgd.train_loss, rtol=0.03, atol=0)
    assert {tensor.dtype for tensor in run.weights.values()} == {torch.float32}


def test_packed_rows_train(config: Config, tmp_path: Path) -> None:
    run = finetune(
        config, tmp_path / "run", "dataset.packed=True", "batch_size=1", "epochs=8", "seed=0"
    )
    # 8 rows of 20 to 26 tokens, two or three to a pack of 64.
    assert len(run.train_loss) // 8 in (3, 4)
    assert run.train_loss[-4:].mean() < run.train_loss[:4].mean() / 2


def test_concatenated_datasets_train(config: Config, tmp_path: Path) -> None:
    both = {**config, "dataset": [config["dataset"], config["dataset_val"]], "dataset_val": None}
    run = finetune(both, tmp_path / "run", "batch_size=2")
    assert len(run.train_loss) == 6  # 8 + 5 rows


def test_schedule_clipping_and_logging_do_as_the_config_says(
    sgd_config: Config, tmp_path: Path
) -> None:
    cosine = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
    run = finetune(
        sgd_config,
        tmp_path / "run",
        f"lr_scheduler._component_={cosine}",
        "lr_scheduler.num_warmup_steps=2",
        "clip_grad_norm=0.001",
        "log_peak_memory_stats=True",
        "metric_logger.filename=log.txt",
    )
    steps = [
        dict(pair.split(":") for pair in line.partition(" | ")[2].split())
        for line in (run.directory / "logs" / "log.txt").read_text().splitlines()
    ]
    assert [float(step["lr"]) for step in steps] == [0.0, 0.05, 0.1]
    assert all(float(step["grad_norm"]) > 0.001 for step in steps)
    assert all(float(step["peak_memory_gib"]) > 0 for step in steps)


def test_batch_without_a_single_label_changes_nothing(
    config: Config, sgd_config: Config, tmp_path: Path
) -> None:
    """Rows whose prompt alone fills max_seq_len have no label; they must not become NaN."""
    long_prompt = {"input": "box " * 60, "output": "it is red"}
    rows = write_jsonl(tmp_path / "rows.jsonl", [long_prompt] * 2 + colour_rows(2))
    for loss in ("qst_tune.modules.LinearCrossEntropyLoss", "torch.nn.CrossEntropyLoss"):
        run = finetune(
            sgd_config,
            tmp_path / loss,
            f"dataset.data_files={rows}",
            f"loss._component_={loss}",
            "gradient_accumulation_steps=2",
        )
        assert run.train_loss.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in run.weights.values())
        assert run.weights["upsample.weight"].abs().max() > 0


# Coming from torchtune.


def test_lora_config_becomes_a_qst_config_by_its_model_block_alone(tmp_path: Path) -> None:
    stock = Path(torchtune.__file__).parent.parent / "recipes/configs/llama3_2"
    lora = OmegaConf.load(stock / "1B_lora_single_device.yaml")
    lora.model = {
        "_component_": "qst_tune.models.qst_llama3_2",
        **LLAMA3_SIZES,
        "reduction_factor": 2,
    }
    OmegaConf.save(lora, tmp_path / "qst.yaml")
    write_checkpoint(tmp_path / "model", sizes=LLAMA3_SIZES)
    write_tiktoken(tmp_path / "model" / "original" / "tokenizer.model")
    alpaca = [{"instruction": f"name colour {i}", "input": "", "output": "red"} for i in range(8)]
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca)
    result = tune_here(
        "run",
        "qst_finetune",
        "--config",
        "qst.yaml",
        # Where things are on this machine.
        f"output_dir={tmp_path / 'run'}",
        f"checkpointer.checkpoint_dir={tmp_path / 'model'}",
        f"tokenizer.path={tmp_path / 'model/original/tokenizer.model'}",
        "dataset.source=json",
        f"dataset.data_files={rows}",
        f"dataset.cache_dir={tmp_path / 'cache'}",
        "device=cpu",
        # Two steps of 8 rows instead of 6000 of 50,000.
        "gradient_accumulation_steps=1",
        "max_steps_per_epoch=2",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    run = FinetuneResult(tmp_path / "run")
    assert run.train_loss.shape == (2,)
    assert run.train_loss.isfinite().all()
    assert run.weights_file.is_file()
