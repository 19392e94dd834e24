"""From a config to a model that can be used tuned or as it was."""

from pathlib import Path

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.results.tuned_model import load_tuned_model
from tests.support.checkpoints import SIZES, finetune_config
from tests.support.directories import side_network_directory
from tests.support.numbers import random_tokens
from tests.support.recipe_runs import merged


@torch.no_grad()
def test_a_side_network_is_found_in_the_runs_directory_and_can_be_left_out(tmp_path: Path) -> None:
    directory, expected = side_network_directory(tmp_path)
    config = {**finetune_config(tmp_path), "output_dir": str(tmp_path)}
    tokens = random_tokens(vocab_size=300)
    tuned = load_tuned_model(merged(config))
    assert tuned.is_tuned
    assert torch.equal(tuned.model(tokens), expected(tokens))
    assert tuned.tokenizer.max_seq_len is None  # the config's 64 would cut an answer's beginning
    with tuned.untuned():
        base = tuned.model(tokens)
    assert not torch.equal(base, expected(tokens))
    elsewhere = {**config, "output_dir": str(tmp_path / "x"), "side_network": str(directory)}
    named = load_tuned_model(merged(elsewhere))
    assert torch.equal(named.model(tokens), expected(tokens))
    without = load_tuned_model(merged({**config, "side_network": None}))
    assert not without.is_tuned
    with without.untuned():
        assert torch.equal(without.model(tokens), base)


@torch.no_grad()
def test_scales_are_exchanged_in_place_and_come_back(tmp_path: Path) -> None:
    model = {"_component_": "qst_tune.models.peqa_llama3_2", **SIZES, "bits": 4}
    config = {**finetune_config(tmp_path), "model": model, "scales": None}
    tuned, tokens = load_tuned_model(merged(config)), random_tokens(vocab_size=300)
    rounded = tuned.model(tokens)
    for scale in tuned.model.task().values():
        scale.mul_(torch.rand_like(scale) + 0.5)
    changed = tuned.model(tokens)
    assert not torch.equal(changed, rounded)
    with tuned.untuned():
        assert torch.equal(tuned.model(tokens), rounded)
    assert torch.equal(tuned.model(tokens), changed)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"_component_": "torchtune.models.llama3_2.llama3_2"}, "builds no model that writes text"),
        ({"_component_": "qst_tune.models.peqa_llama3_2"}, "it takes scales"),
    ],
)
def test_what_does_not_fit_is_told(model: dict, message: str, tmp_path: Path) -> None:
    config = {**finetune_config(tmp_path), "model": {**model, **SIZES}, "side_network": "there"}
    if "torchtune" in model["_component_"]:
        del config["model"]["scale_factor"]
    with pytest.raises(UserError, match=message):
        load_tuned_model(merged(config))
