"""The recipes over models that torchtune does not have: transformers' own, with tiny weights."""

import json
from pathlib import Path

import pytest
import torch
from qst_tune.recipes import peqa_finetune, qst_dpo, qst_evaluate, qst_finetune, qst_generate

from qst_tune.config.file import parse_config
from qst_tune.errors import UserError
from qst_tune.sharing.inspection import verify_directory
from qst_tune.transformers import QSTForCausalLM
from tests.support.checkpoints import (
    colour_rows,
    finetune_config,
    write_chat_tokenizer,
    write_jsonl,
)
from tests.support.methods import write_pairs
from tests.support.model_types import tiny_model
from tests.support.ranks import run_on
from tests.support.recipe_runs import merged, one_thread, run_tune

CONFIG = Path(__file__).parents[2] / "configs" / "auto" / "qst.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and a mixture of experts with sliding windows."""
    root = tmp_path_factory.mktemp("transformers")
    for model_type in ("smollm3", "gpt_oss"):
        tiny_model(model_type, vocab_size=307).save_pretrained(root / model_type)
        write_chat_tokenizer(root / model_type)
    write_jsonl(root / "train.jsonl", colour_rows(8))
    return root


def arguments(root: Path, model_type: str, output: Path, *further: str) -> list[str]:
    return [
        f"checkpoint_dir={root / model_type}",
        f"output_dir={output}",
        "dataset._component_=torchtune.datasets.instruct_dataset",
        "dataset.source=json",
        f"dataset.data_files={root / 'train.jsonl'}",
        f"dataset.cache_dir={root / 'cache'}",
        "tokenizer.max_seq_len=64",
        "batch_size=4",
        "gradient_accumulation_steps=1",
        "optimizer.fused=False",
        "optimizer.lr=1e-2",
        "lr_scheduler=null",
        "device=cpu",
        "dtype=fp32",
        "model.reduction_factor=4",
        *further,
    ]


def run(root: Path, model_type: str, output: Path, *further: str) -> dict[str, float]:
    """Train in this process; the loss of each step."""
    given = arguments(root, model_type, output, *further)
    with one_thread():
        qst_finetune.main(parse_config(["--config", str(CONFIG), *given]))
    losses: dict[str, float] = json.loads((output / "summary.json").read_text())["train_loss"]
    return losses


def learns(losses: dict[str, float]) -> bool:
    first, *_, last = losses.values()
    return last < first


def test_a_run_trains_and_resumes_as_if_it_had_not_stopped(root: Path, tmp_path: Path) -> None:
    whole = run(root, "gpt_oss", tmp_path / "whole", "epochs=2", "val_fraction=0.25")
    run(root, "gpt_oss", tmp_path / "half", "epochs=1", "val_fraction=0.25")
    resumed = ["epochs=2", "val_fraction=0.25", "resume_from_checkpoint=True"]
    assert run(root, "gpt_oss", tmp_path / "half", *resumed) == whole
    assert learns(whole)


def test_packed_rows_and_kept_states_train(root: Path, tmp_path: Path) -> None:
    packed = ["dataset.packed=True", "batch_size=1", "epochs=3"]
    kept = [f"hidden_state_cache={tmp_path / 'states'}"]
    computed = run(root, "gpt_oss", tmp_path / "a", *packed, *kept)
    assert run(root, "gpt_oss", tmp_path / "b", *packed, *kept) == computed
    assert learns(computed)


def test_the_result_generates_by_the_recipe_and_by_transformers(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(root, "smollm3", tmp_path, "epochs=1")
    given = arguments(root, "smollm3", tmp_path, "prompts=[red, the colour of]", "max_new_tokens=3")
    with one_thread():
        qst_generate.main(parse_config(["--config", str(CONFIG), *given]))
    assert "with the side network: the colour of" in capsys.readouterr().out
    model = QSTForCausalLM.from_pretrained(tmp_path / "side_network", dtype=torch.float32)
    tokens = torch.arange(3, 23)[None]
    with_cache = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(
        with_cache, model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False)
    )


def test_the_result_is_evaluated_verified_and_tuned_on_by_preferences(
    root: Path, tmp_path: Path
) -> None:
    """Over a mixture of experts with sliding windows; the reference is the tuned model."""
    run(root, "gpt_oss", tmp_path / "sft", "epochs=10")
    tuned = f"side_network={tmp_path / 'sft' / 'side_network'}"
    text = " ".join(f"{row['input']} {row['output']}" for row in colour_rows(8))
    (tmp_path / "text.txt").write_text(text)
    further = [f"text={tmp_path / 'text.txt'}", "window=24", tuned]
    given = arguments(root, "gpt_oss", tmp_path / "evaluated", *further)
    with one_thread():
        qst_evaluate.main(parse_config(["--config", str(CONFIG), *given]))
    table = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    base, after = (row["perplexity"] for row in table.values())
    assert after < 0.9 * base
    verify_directory(tmp_path / "sft" / "side_network", root / "gpt_oss")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    given = arguments(root, "gpt_oss", tmp_path / "dpo", "epochs=4", "val_fraction=0.25", tuned)
    given = [setting for setting in given if not setting.startswith("dataset.")]
    given += ["dataset._component_=qst_tune.data.auto_dataset", f"dataset.data_files={pairs}"]
    given += ["loss._component_=torchtune.rlhf.loss.DPOLoss"]
    with one_thread():
        qst_dpo.main(parse_config(["--config", str(CONFIG), *given]))
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    first, *_, last = summary["val_loss"].values()
    assert first == pytest.approx(0.6931, abs=1e-4)
    assert last < first
    assert list(summary["metrics"]["reward_accuracy"].values())[-1] == 1.0


def test_both_backbones_of_one_model_learn_alike(tmp_path: Path) -> None:
    """A Llama, which torchtune has too: the first loss is the same, later ones nearly."""
    config = {**finetune_config(tmp_path), "epochs": 3, "dataset_val": None}
    directory = str(tmp_path / "model")
    choices = {"_component_": "qst_tune.models.qst_from_hf", "reduction_factor": 4, "rank": 4}
    other = {
        **config,
        "model": {
            **choices,
            "_component_": "qst_tune.models.qst_from_hf",
            "checkpoint_dir": directory,
        },
        "checkpointer": {
            "_component_": "qst_tune.training.HFCheckpointer",
            "checkpoint_dir": directory,
        },
    }
    losses = []
    for name, chosen in (("torchtune", config), ("transformers", other)):
        with one_thread():
            qst_finetune.main(merged(chosen, f"output_dir={tmp_path / name}"))
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        losses.append(torch.tensor(list(summary["train_loss"].values())))
    torch.testing.assert_close(losses[0][:1], losses[1][:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    with pytest.raises(UserError, match="was tuned over model in torchtune's modules, and here"):
        qst_evaluate.main(
            merged(
                {k: other[k] for k in ("model", "checkpointer", "tokenizer", "device", "dtype")},
                f"output_dir={tmp_path / 'out'}",
                f"side_network={tmp_path / 'torchtune' / 'side_network'}",
                f"text={tmp_path / 'train.jsonl'}",
                "window=24",
            )
        )


@pytest.mark.parametrize("sharding", [pytest.param("null", marks=pytest.mark.slow), "full"])
def test_two_processes_train_what_one_trains(sharding: str, root: Path, tmp_path: Path) -> None:
    further = ["epochs=2", "val_fraction=0.25"]
    alone = run(root, "gpt_oss", tmp_path / "one", *further)
    further += ["batch_size=2", f"backbone_sharding={sharding}"]
    given = arguments(root, "gpt_oss", tmp_path / "two", *further)
    run_on(2, qst_finetune, parse_config(["--config", str(CONFIG), *given]))
    together = json.loads((tmp_path / "two" / "summary.json").read_text())["train_loss"]
    assert together == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow  # compiles each layer
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_compile_gives_the_same_run(form: str, root: Path, tmp_path: Path) -> None:
    """Of a mixture, whose experts are one tensor in NF4 and a linear layer each in int8."""
    further = ["epochs=2", f"model.base_quantization={form}"]
    plain = run(root, "gpt_oss", tmp_path / "plain", *further)
    compiled = run(root, "gpt_oss", tmp_path / "compiled", *further, "compile=True")
    assert compiled == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_two_processes_share_the_integers_whose_scales_train(root: Path, tmp_path: Path) -> None:
    """PEQA over a mixture; each process gathers layers in both passes."""
    losses = []
    for size in (1, 2):
        further = ["epochs=3", "optimizer.lr=1e-4", f"batch_size={4 // size}"]
        further += ["backbone_sharding=full"] * (size > 1)
        given = arguments(root, "gpt_oss", tmp_path / str(size), *further)
        given = [setting for setting in given if "reduction_factor" not in setting]
        config = CONFIG.with_name("peqa_4bit.yaml")
        run_on(size, peqa_finetune, parse_config(["--config", str(config), *given]))
        summary = json.loads((tmp_path / str(size) / "summary.json").read_text())
        losses.append(summary["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert learns(losses[1])


def test_a_choice_of_backbone_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    message = r"takes no argument 'backbone'; in qst_tune it is none"
    with pytest.raises(UserError, match=message) as error:
        run(root, "smollm3", tmp_path, "model.backbone=torchtune")
    assert "\n" not in str(error.value)


def test_the_second_start_reads_the_quantised_weights(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (
        run(root, "gpt_oss", tmp_path / name, f"checkpointer.cache_dir={tmp_path / 'cache'}")
        for name in ("first", "second")
    )
    assert first == second
    assert caplog.text.count("quantised backbone read from") == 1


@pytest.mark.slow
def test_tune_run_trains_as_documented(root: Path, tmp_path: Path) -> None:
    given = arguments(root, "smollm3", tmp_path / "out", "epochs=2")
    result = run_tune("run", "qst_finetune", "--config", "auto/qst", *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = json.loads((tmp_path / "out" / "summary.json").read_text())["train_loss"]
    assert learns(losses)
