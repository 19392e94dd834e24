"""A result renders and ends conversations as its run did, also where transformers loads it."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

import qst_tune.transformers  # noqa: F401  # registers the model
from qst_tune.data import hf_chat_tokenizer
from qst_tune.models.build import build_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules.meta_device import materialize
from qst_tune.results.provenance import provenance_of
from qst_tune.results.tuned_directory import save_tuned
from tests.support.checkpoints import finetune_config
from tests.support.configs import typed_config

CPU = torch.device("cpu")
SHOUTING = (
    "{% for m in messages %}{{ '<|' + m['role'] | upper + '|> ' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|ASSISTANT|> {% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]


def result(root: Path, template: str | None) -> Path:
    """Save the result of a run whose tokenizer has this chat template."""
    config = finetune_config(root)
    config["tokenizer"] = {
        "_component_": "qst_tune.data.hf_chat_tokenizer",
        "path": str(root / "model"),
        "chat_template": template,
    }
    cfg = OmegaConf.create(config)
    model = build_on_meta(cfg.model, torch.float32)
    backbone = load_frozen_backbone(model, cfg.checkpointer, dtype=torch.float32, device=CPU)
    materialize(model.side, CPU)
    origin = provenance_of(typed_config(cfg), backbone)
    save_tuned(root / "side_network", model.side, origin)
    return root / "side_network"


@pytest.mark.parametrize("how", ["name", "text", "file", "own"])
def test_transformers_renders_what_the_run_rendered(tmp_path: Path, how: str) -> None:
    file = tmp_path / "shouting.jinja"
    file.write_text(SHOUTING)
    given = {"name": "zephyr", "text": SHOUTING, "file": str(file), "own": None}[how]
    directory = result(tmp_path, given)
    of_the_run = hf_chat_tokenizer(str(tmp_path / "model"), chat_template=given)
    file.unlink()  # a result goes to other machines
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == of_the_run.chat_template.render(MESSAGES)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.generation_config.eos_token_id == of_the_run.stop_tokens


def test_a_file_that_a_foreign_config_names_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = result(tmp_path, None)
    secret = tmp_path / "secret.jinja"
    secret.write_text(SHOUTING)
    config = OmegaConf.load(directory / "recipe_config.yaml")
    config.tokenizer.chat_template = str(secret)
    OmegaConf.save(config, directory / "recipe_config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert "ASSISTANT" not in tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert "the backbone's is used" in caplog.text
