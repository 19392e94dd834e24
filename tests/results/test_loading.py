"""From a config, or from directories, to models that can be used tuned or as they were."""

import json
from pathlib import Path

import pytest
import torch

from qst_tune.config.schema import TunedModelConfig
from qst_tune.errors import UserError
from qst_tune.results.loading import load_directory, load_side_networks, load_tuned_model
from tests.support.checkpoints import SIZES, finetune_config
from tests.support.configs import typed_config
from tests.support.directories import CPU, side_network_directory
from tests.support.numbers import random_tokens


@torch.no_grad()
def test_a_side_network_is_found_in_the_runs_directory_and_can_be_left_out(tmp_path: Path) -> None:
    directory, expected = side_network_directory(tmp_path)
    config = {**finetune_config(tmp_path), "output_dir": str(tmp_path)}
    tokens = random_tokens(vocab_size=300)
    tuned = load_tuned_model(typed_config(config, TunedModelConfig))
    assert tuned.is_tuned
    assert torch.equal(tuned.model(tokens), expected(tokens))
    assert tuned.tokenizer.max_seq_len is None  # the config's 64 would cut an answer's beginning
    with tuned.untuned():
        base = tuned.model(tokens)
    assert not torch.equal(base, expected(tokens))
    elsewhere = {**config, "output_dir": str(tmp_path / "x"), "side_network": str(directory)}
    named = load_tuned_model(typed_config(elsewhere, TunedModelConfig))
    assert torch.equal(named.model(tokens), expected(tokens))
    without = load_tuned_model(typed_config({**config, "side_network": None}, TunedModelConfig))
    assert not without.is_tuned
    with without.untuned():
        assert torch.equal(without.model(tokens), base)


@torch.no_grad()
def test_a_side_network_over_a_repaired_backbone_is_loaded_over_that_repair_alone(
    tmp_path: Path,
) -> None:
    directory, expected = side_network_directory(tmp_path, repair_rank=8)
    tokens = random_tokens(vocab_size=300)
    loaded = load_directory(directory, tmp_path / "model", dtype=torch.float32, device=CPU)
    assert torch.equal(loaded.model(tokens), expected(tokens))
    assert loaded.backbone.quantization.startswith("nf4 + rank 8, scales searched (text ")
    config = {**finetune_config(tmp_path), "output_dir": str(tmp_path)}
    for rank, name in ((0, "'nf4'"), (4, "'nf4 \\+ rank 4, ")):
        other = {**config, "model": {**config["model"], "repair_rank": rank}}
        with pytest.raises(UserError, match=f"quantization 'nf4 \\+ rank 8, .* there, {name}"):
            load_tuned_model(typed_config(other, TunedModelConfig))


@torch.no_grad()
def test_scales_are_exchanged_in_place_and_come_back(tmp_path: Path) -> None:
    model = {"_component_": "qst_tune.models.peqa_llama3_2", **SIZES, "bits": 4}
    config = {**finetune_config(tmp_path), "model": model, "scales": None}
    tuned, tokens = (
        load_tuned_model(typed_config(config, TunedModelConfig)),
        random_tokens(vocab_size=300),
    )
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
def test_what_does_not_fit_is_reported(model: dict, message: str, tmp_path: Path) -> None:
    config = {**finetune_config(tmp_path), "model": {**model, **SIZES}, "side_network": "there"}
    if "torchtune" in model["_component_"]:
        del config["model"]["scale_factor"]
    with pytest.raises(UserError, match=message):
        load_tuned_model(typed_config(config, TunedModelConfig))


@torch.no_grad()
def test_each_row_has_the_logits_of_its_directories_own_model(tmp_path: Path) -> None:
    directories, alone = {}, {}
    for seed, (name, settings) in enumerate(
        {"narrow": {}, "wide": {"reduction_factor": 2}}.items()
    ):
        directories[name], alone[name] = side_network_directory(
            tmp_path, name, seed=seed, **settings
        )
    loaded = load_directory(
        directories["narrow"], tmp_path / "model", dtype=torch.float32, device=CPU
    )
    before = [parameter.data_ptr() for parameter in loaded.model.layers.parameters()]
    side = load_side_networks(loaded.model, directories, backbone=loaded.backbone)
    assert before == [parameter.data_ptr() for parameter in loaded.model.layers.parameters()]
    tokens = random_tokens(batch=3, vocab_size=300)
    side.use(["wide", "narrow", "wide"])
    together = loaded.model(tokens)
    for row, name in enumerate(["wide", "narrow", "wide"]):
        expected = alone[name](tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_directories_that_do_not_go_together_are_reported(tmp_path: Path) -> None:
    all_layers, _ = side_network_directory(tmp_path, "all")
    one_layer, _ = side_network_directory(tmp_path, "one", num_side_blocks=1)
    loaded = load_directory(all_layers, tmp_path / "model", dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match="one: side networks must read the same layers"):
        load_side_networks(
            loaded.model, {"a": all_layers, "b": one_layer}, backbone=loaded.backbone
        )


def test_a_reference_in_the_model_block_of_a_directory_is_not_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = side_network_directory(tmp_path, "one")
    path = directory / "qst_config.json"
    content = json.loads(path.read_text())
    content["model"]["output_mix"] = "${oc.env:QST_TUNE_TOKEN}"
    path.write_text(json.dumps(content))
    monkeypatch.setenv("QST_TUNE_TOKEN", "hf_secret")
    with pytest.raises(UserError, match=r"model\.output_mix is '\$\{oc\.env:QST_TUNE_TOKEN\}'"):
        load_directory(directory, tmp_path / "model", dtype=torch.float32, device=CPU)
