"""A run starts from what was tuned, records it, and its result is what is loaded afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qst_tune.recipes import qst_dpo

from qst_tune.config.schema import TunedModelConfig
from qst_tune.errors import UserError
from qst_tune.results.loading import load_tuned_model
from qst_tune.results.start import digest_of, find_start, result_to_load
from tests.support.checkpoints import Config, finetune_config
from tests.support.configs import typed_config
from tests.support.methods import write_pairs
from tests.support.recipe_runs import FinetuneResult, finetune, merged, one_thread


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return finetune_config(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def first(config: Config) -> FinetuneResult:
    return finetune(config, Path(config["output_dir"]).with_name("first"), "epochs=2")


@pytest.fixture(scope="module")
def second(config: Config, first: FinetuneResult) -> FinetuneResult:
    directory = first.directory.with_name("second")
    return finetune(config, directory, *from_first(first), "epochs=3")


def from_first(first: FinetuneResult) -> list[str]:
    return [f"side_network={first.directory / 'side_network'}", "optimizer.lr=1e-3"]


def description(run: FinetuneResult) -> dict[str, Any]:
    return json.loads((run.directory / "side_network" / "qst_config.json").read_text())


def test_lineage_is_in_the_description_and_the_card(
    first: FinetuneResult, second: FinetuneResult
) -> None:
    assert "lineage" not in description(first)
    entry = {
        "name": "first/side_network",
        "digest": digest_of(first.weights),
        "steps": 4,
        "data": ["train.jsonl"],
    }
    assert description(second)["lineage"] == [entry]
    card = (second.directory / "side_network" / "README.md").read_text()
    line = f"| first/side_network | 4 | train.jsonl | `{entry['digest'][:16]}...` |"
    assert line in card.splitlines()
    start = find_start(
        typed_config({"side_network": str(second.directory / "side_network"), "output_dir": "x"})
    )
    assert start is not None
    assert [link.name for link in start.lineage] == ["first/side_network", "second/side_network"]


def test_digest_sees_every_value_name_and_shape(first: FinetuneResult) -> None:
    tensors = first.weights
    name = next(iter(tensors))
    changed = {**tensors, name: tensors[name].clone()}
    assert digest_of(changed) == digest_of(tensors)
    changed[name].view(-1)[0] += 1e-7
    assert digest_of(changed) != digest_of(tensors)
    assert digest_of({"a": torch.zeros(2, 3)}) != digest_of({"a": torch.zeros(3, 2)})
    assert digest_of({"a": torch.zeros(2)}) != digest_of({"b": torch.zeros(2)})


def test_result_is_loaded_where_the_training_config_names_the_start(
    config: Config, first: FinetuneResult, second: FinetuneResult, tmp_path: Path
) -> None:
    start, result = (run.directory / "side_network" for run in (first, second))
    cfg = {**config, "output_dir": str(second.directory), "side_network": str(start)}
    tuned = load_tuned_model(typed_config(cfg, TunedModelConfig)).model.side.state_dict()
    assert all(torch.equal(tuned[name], value) for name, value in second.weights.items())

    def chosen(**changes: Any) -> Path | None:
        asked = typed_config({**cfg, **changes}, TunedModelConfig)
        return result_to_load(asked.side_network, asked.output_dir, "side_network")

    assert chosen() == result
    assert chosen(output_dir=str(tmp_path)) == start, "no result is there yet"
    assert chosen(output_dir=None) == start
    assert chosen(side_network=str(result)) == result
    assert chosen(side_network=None) is None
    assert chosen(output_dir=str(first.directory)) == start, "that run started from nothing"
    gone = second.directory / "gone" / "first" / "side_network"
    assert chosen(side_network=str(gone)) == result, "known by its name"
    untold = typed_config({"output_dir": "a"}, TunedModelConfig)
    assert result_to_load(untold.scales, untold.output_dir, "scales") == Path("a/scales")


def test_dpo_is_compared_with_the_start_in_one_backbone_pass(
    config: Config, first: FinetuneResult, tmp_path: Path
) -> None:
    dataset = {
        "_component_": "torchtune.datasets.preference_dataset",
        "source": "json",
        "data_files": str(write_pairs(tmp_path / "pairs.jsonl", 8)),
    }
    loss = {"_component_": "torchtune.rlhf.loss.DPOLoss"}
    pairs = {**config, "dataset": dataset, "dataset_val": None, "val_fraction": 0.25, "loss": loss}

    def losses(name: str, *more: str) -> dict[int, float]:
        overrides = [f"output_dir={tmp_path / name}", "epochs=1", *more]
        with one_thread():
            qst_dpo.main(merged(pairs, *overrides))
        return FinetuneResult(tmp_path / name).val_loss

    start = losses("start", *from_first(first))
    assert start[0] == pytest.approx(0.6931, abs=1e-4), "the start is its own reference"
    backbone = losses("backbone", *from_first(first), "reference=backbone")
    assert abs(backbone[0] - 0.6931) > 1e-3, "the start already differs from the backbone"
    with pytest.raises(UserError, match=r"^reference=start needs side_network"):
        losses("none", "reference=start")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("side_network=absent", "^absent is not a QST side network: it has no qst_config.json"),
        ("scales=absent", "scales=absent is what PEQA starts from; use side_network"),
        ("reference=best", "reference=best must be start, backbone or null"),
        ("reference=start", "reference=start is for qst_dpo; remove it"),
    ],
)
def test_wrong_start_is_one_line_before_anything_loads(
    override: str, message: str, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        finetune(config, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_result_is_not_its_own_start(config: Config, first: FinetuneResult) -> None:
    with pytest.raises(UserError, match=r"is this run's own result: name another outp"):
        finetune(config, first.directory, *from_first(first))
    assert (first.directory / "side_network" / "qst_config.json").exists()


def test_side_network_of_another_shape_does_not_fit(
    config: Config, first: FinetuneResult, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"does not fit the model: .* tensors differ"):
        finetune(config, tmp_path / "run", *from_first(first), "model.reduction_factor=8")


def test_data_of_several_files_is_recorded(first: FinetuneResult) -> None:
    directory = first.directory / "side_network"
    both = "dataset:\n- data_files: [/x/a.jsonl, b.jsonl]\n- source: org/set\n"
    config = (directory / "recipe_config.yaml").read_text()
    (directory / "recipe_config.yaml").write_text(both)
    try:
        start = find_start(typed_config({"side_network": str(directory), "output_dir": "x"}))
    finally:
        (directory / "recipe_config.yaml").write_text(config)
    assert start is not None
    assert start.lineage[-1].data == ("a.jsonl", "b.jsonl", "set")
