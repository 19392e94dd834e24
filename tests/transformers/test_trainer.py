"""transformers' Trainer and TRL's SFTTrainer train, save and resume a side network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from qst_tune import QSTForCausalLM, SideConfig, get_qst_model
from tests.support.checkpoints import write_model_directory
from tests.support.documented_commands import ROOT, commands
from tests.support.printed_runs import Place, run

pytest.importorskip("accelerate", reason="needs the extra trl")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_directory(tmp_path_factory.mktemp("trainer") / "model")


def tuned_model(directory: Path) -> QSTForCausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return get_qst_model(model, SideConfig(reduction_factor=4, rank=8))


def token_rows(count: int) -> Dataset:
    tokens = torch.randint(3, 300, (count, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


SETTINGS: dict[str, Any] = {
    "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def test_trainer_resumes_as_if_it_had_not_stopped(directory, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = token_rows(8)

    def trainer(name: str, **more: Any) -> Trainer:
        args = TrainingArguments(output_dir=tmp_path / name, **SETTINGS, **more)
        return Trainer(model=tuned_model(directory), args=args, train_dataset=rows)

    # Recomputation changes nothing.
    whole = trainer("whole", gradient_accumulation_steps=2, activation_checkpointing=True)
    whole.train()
    assert whole.model.model.side.recompute
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert float(losses[-1]) < float(losses[0])
    resumed = trainer("resumed", gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    want = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, want[name])
    assert not list((tmp_path / "whole/checkpoint-2").glob("pytorch_model*"))
    opened = QSTForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4", dtype=torch.float32)
    for name, value in opened.state_dict().items():
        assert torch.equal(value, want[name])
    figures = whole.evaluate(rows)
    tokens = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        expected = opened(tokens, labels=tokens).loss.item()
    assert float(figures["eval_loss"]) == pytest.approx(expected, abs=1e-3)


def test_tensors_of_another_side_network_are_not_loaded(directory):
    model = tuned_model(directory)
    tensors = model.state_dict()
    tensors.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(tensors, strict=False)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_learns_a_conversation(packing, directory, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra trl")
    conversation = [
        {"role": "user", "content": "what is the colour of it"},
        {"role": "assistant", "content": "red"},
    ]
    args = trl.SFTConfig(
        output_dir=tmp_path, max_length=64, packing=packing, bf16=False, **SETTINGS
    )
    trainer = trl.SFTTrainer(
        model=tuned_model(directory),
        args=args,
        train_dataset=Dataset.from_list([{"messages": conversation}] * 4),
        processing_class=AutoTokenizer.from_pretrained(directory),
    )
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    # Four equal rows: packed or not, the first loss is that of one of them.
    ids = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        conversation, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        expected = tuned_model(directory)(ids, labels=ids).loss.item()
    assert losses[0] == pytest.approx(expected, abs=1e-3)
    assert losses == sorted(losses, reverse=True)
    QSTForCausalLM.from_pretrained(tmp_path / "checkpoint-4")


def test_the_snippets_of_the_page_run_as_printed(tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the extra trl")
    place = Place(tmp_path)
    snippets = [printed for printed in commands(ROOT / "docs/python.md") if printed.is_python]
    assert len(snippets) == 2
    for printed in snippets:
        run(printed, place)
    assert "trainable params: " in capsys.readouterr().out
    assert (tmp_path / "my_side_network/side_network.safetensors").is_file()
    assert list((tmp_path / "my_sft_run").glob("checkpoint-*"))
