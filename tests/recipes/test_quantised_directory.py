"""Recipes over directories that are quantised already: train, save, load, generate, evaluate."""

from pathlib import Path

import pytest
import torch
from qst_tune.recipes import qst_finetune

from qst_tune.transformers import QSTForCausalLM
from tests.recipes.test_from_hf import arguments, losses, run
from tests.support.checkpoints import colour_rows, write_chat_tokenizer, write_jsonl
from tests.support.stored_models import save_stored


@pytest.mark.parametrize(
    ("model_type", "form"),
    [("qwen2", "bnb_nf4"), ("qwen2", "fp8"), ("qwen3_moe", "gptq_act_order")],
)
def test_the_shipped_config_learns_over_a_quantised_directory(
    model_type: str, form: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    directory = tmp_path / "model"
    directory.mkdir()
    save_stored(directory, model_type, form, vocab_size=307)
    write_chat_tokenizer(directory)
    write_jsonl(tmp_path / "train.jsonl", colour_rows(8))
    further = ["model.reduction_factor=4", "max_steps_per_epoch=1", "epochs=3"]
    output = tmp_path / "out"
    run(qst_finetune, "auto/qst", *arguments(tmp_path, directory, output, *further))
    assert losses(output)[-1] < losses(output)[0]
    tuned = output / "side_network"
    model = QSTForCausalLM.from_pretrained(tuned, backbone=str(directory), dtype=torch.float32)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
