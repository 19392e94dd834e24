"""torchtune's own recipe `eleuther_eval` scores a side network as we do, on local files."""

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from qst_tune.data import hf_chat_tokenizer
from qst_tune.evaluation.log_likelihood import Continuation, log_likelihood_passes
from qst_tune.training.task import complete
from tests.support.checkpoints import finetune_config, write_config, write_jsonl
from tests.support.directories import side_network_directory
from tests.support.recipe_runs import run_tune

CONFIGS = Path(__file__).parents[2] / "configs"
CHOICES = ["it", "is", "of", "box"]


def is_installed() -> bool:
    """The recipe compares lm-eval's version as text, and that lm-eval needs transformers 4."""
    try:
        return version("lm-eval") >= "0.4.5" and transformers.__version__ < "5"
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not is_installed(), reason="needs the extra stock-eval")


def write_task(directory: Path, rows: Path) -> None:
    """Of the harness: questions whose answer is the likeliest of four words."""
    task = {
        "task": "boxes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    directory.mkdir()
    OmegaConf.save(OmegaConf.create(task), directory / "boxes.yaml")


def write_gpt2(directory: Path, tokenizer_of: Path) -> None:
    """What the recipe loads under this name and then replaces."""
    config = transformers.GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text((tokenizer_of / name).read_text())


def test_its_accuracy_is_ours(tmp_path: Path) -> None:
    side_network, model = side_network_directory(tmp_path)
    tokenizer = hf_chat_tokenizer(str(tmp_path / "model"))
    questions = [f"what is the colour of box {number}" for number in range(9)]
    best = []
    for question in questions:
        pairs = [
            Continuation(
                tuple(tokenizer.encode(question, add_bos=False, add_eos=False)),
                tuple(tokenizer.encode(f" {choice}", add_bos=False, add_eos=False)),
            )
            for choice in CHOICES
        ]
        found = complete(log_likelihood_passes(model, pairs, batch_size=4))
        best.append(int(torch.tensor(found).argmax()))
    # Right by the model's own choice in six of nine.
    answers = [(choice + (number % 3 == 0)) % 4 for number, choice in enumerate(best)]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    write_task(tmp_path / "tasks", write_jsonl(tmp_path / "rows.jsonl", rows))
    write_gpt2(tmp_path / "gpt2", tmp_path / "model")

    trained = finetune_config(tmp_path)
    ours = OmegaConf.load(CONFIGS / "smollm2" / "135M_stock_eleuther_eval.yaml")
    config = {
        **OmegaConf.to_container(ours),
        "model": trained["model"],
        "tokenizer": {**trained["tokenizer"], "max_seq_len": None},
        "checkpointer": {
            **trained["checkpointer"],
            "_component_": ours.checkpointer._component_,
            "side_network": str(side_network),
        },
        "tasks": ["boxes"],
        "include_path": str(tmp_path / "tasks"),
        "max_seq_length": 64,
        "batch_size": 4,
    }
    path = write_config(tmp_path / "eval.yaml", config)
    result = run_tune("run", "eleuther_eval", "--config", path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (found,) = re.findall(r"\|acc *\|[^|]*\|([ 0-9.]+)\|", result.stdout + result.stderr)
    assert float(found) == pytest.approx(6 / 9, abs=1e-4), json.dumps(best)
