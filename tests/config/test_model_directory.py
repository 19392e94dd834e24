"""A model by its hub name in every recipe: one download, and results that name the model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from qst_tune.recipes import qst_estimate, qst_evaluate, qst_finetune, qst_generate
from transformers import AutoTokenizer

import qst_tune.transformers  # registers the model class
from qst_tune.config.file import parse_config
from qst_tune.config.model_directory import fetch_models, with_hub_names
from qst_tune.errors import UserError
from qst_tune.sharing.__main__ import main as sharing
from tests.support.checkpoints import (
    colour_rows,
    finetune_config,
    write_jsonl,
    write_model_directory,
)
from tests.support.configs import typed_config
from tests.support.fake_hub import COMMIT, FakeHub, serving, use
from tests.support.recipe_runs import merged, one_thread

CONFIGS = Path(__file__).parents[2] / "configs"
REPO = "some-org/colours"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(tmp_path / "served") as fake:
        write_model_directory(fake.root / REPO)
        (fake.root / REPO / "README.md").write_text("A model.")
        use(monkeypatch, fake.url, tmp_path / "home")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield fake


def run(recipe, config: str, *overrides: str) -> None:
    arguments = ["--config", str(CONFIGS / f"{config}.yaml"), *overrides, "device=cpu"]
    with one_thread():
        recipe.main(parse_config(arguments))


def training(tmp_path: Path) -> list[str]:
    rows = write_jsonl(tmp_path / "train.jsonl", colour_rows(8))
    return [
        f"checkpoint_dir={REPO}",
        f"output_dir={tmp_path / 'run'}",
        "dataset._component_=torchtune.datasets.instruct_dataset",
        "dataset.source=json",
        f"dataset.data_files={rows}",
        f"dataset.cache_dir={tmp_path / 'cache'}",
        "batch_size=4",
        "gradient_accumulation_steps=1",
        "optimizer.fused=False",
        "tokenizer.max_seq_len=64",
        "lr_scheduler=null",
        "dtype=fp32",
        "model.reduction_factor=4",
    ]


def names(hub: FakeHub) -> set[str]:
    return {name.rpartition("/")[2] for name in hub.downloads}


def test_a_run_and_everything_after_it_take_the_hub_name(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    run(qst_finetune, "auto/qst", *training(tmp_path))
    assert "model.safetensors" in names(hub)
    assert "README.md" not in names(hub)
    side = tmp_path / "run/side_network"
    described = json.loads((side / "qst_config.json").read_text())
    assert described["backbone"]["name"] == REPO
    assert described["backbone"]["revision"] == COMMIT
    assert described["model"]["checkpoint_dir"] == f"{REPO}@{COMMIT}"
    config = OmegaConf.load(side / "recipe_config.yaml")
    assert config.checkpointer.checkpoint_dir == config.tokenizer.path == f"{REPO}@{COMMIT}"
    assert json.loads((side / "config.json").read_text())["backbone"] == f"{REPO}@{COMMIT}"
    assert REPO in (side / "README.md").read_text()
    assert str(tmp_path / "home") not in "".join(p.read_text() for p in side.glob("*.[jymR]*"))

    # The same commit from the cache, without a network.
    sent = list(hub.downloads)
    use(monkeypatch, hub.url, tmp_path / "home", offline=True)
    answer = [f"checkpoint_dir={REPO}", f"side_network={side}", "prompt=what is it", "dtype=fp32",
              "max_new_tokens=3", "model.reduction_factor=4"]  # fmt: skip
    run(qst_generate, "auto/qst_generate", *answer)
    text = tmp_path / "text.txt"
    text.write_text("what is the colour of the box")
    recipe_config = ["--config", str(side / "recipe_config.yaml"), f"text={text}"]
    with one_thread():  # the run's own config, which names the hub
        qst_evaluate.main(parse_config(recipe_config))
    capsys.readouterr()
    sharing(["verify", str(side), REPO])
    assert f"belongs to {REPO} (nf4)" in capsys.readouterr().out
    for settings in ({}, {"backbone": REPO}):
        model = qst_tune.transformers.QSTForCausalLM.from_pretrained(side, **settings)
        tokenizer = AutoTokenizer.from_pretrained(side, **settings)
        tokens = torch.tensor([tokenizer("what is it").input_ids])
        assert model(tokens).logits.isfinite().all()
    assert hub.downloads == sent


def test_a_dry_run_fetches_no_weights_and_an_estimate_the_config_alone(
    hub: FakeHub, tmp_path: Path
) -> None:
    sizes = [f"checkpoint_dir={REPO}", "tokenizer.max_seq_len=16"]
    run(qst_estimate, "auto/qst", *sizes, f"output_dir={tmp_path / 'estimate'}")
    assert names(hub) == {"config.json"}
    run(qst_finetune, "auto/qst", *training(tmp_path), "dry_run=true")
    assert names(hub) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not (tmp_path / "run").exists()


def test_files_that_a_config_names_are_fetched_and_no_others(hub: FakeHub, tmp_path: Path) -> None:
    served = hub.root / REPO
    served.joinpath("original").mkdir()
    served.joinpath("original/tokenizer.model").write_text("a tokenizer")
    served.joinpath("model.safetensors").rename(served / "model-1-of-1.safetensors")
    cfg = OmegaConf.create(
        {
            "checkpointer": {
                "checkpoint_dir": REPO,
                "checkpoint_files": {"filename_format": "model-{}-of-{}.safetensors",
                                     "max_filename": "1"},
            },
            "tokenizer": {"path": "${checkpointer.checkpoint_dir}/original/tokenizer.model"},
            "dataset": {"source": REPO},
        }
    )  # fmt: skip
    fetch_models(typed_config(cfg))
    assert Path(cfg.tokenizer.path).read_text() == "a tokenizer"
    assert Path(cfg.checkpointer.checkpoint_dir, "model-1-of-1.safetensors").is_file()
    assert cfg.dataset.source == REPO  # a dataset may have a model's name
    plain = with_hub_names(OmegaConf.to_container(cfg, resolve=True))
    assert plain["tokenizer"]["path"] == f"{REPO}@{COMMIT}/original/tokenizer.model"


def test_a_mistake_of_the_config_is_found_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'batchsize'"):
        run(qst_finetune, "auto/qst", *training(tmp_path), "batchsize=3")
    assert not hub.downloads


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(
    hub: FakeHub, tmp_path: Path
) -> None:
    config = finetune_config(tmp_path)
    cfg = merged(config, "checkpointer.checkpoint_dir=some-org/colour")
    with pytest.raises(UserError, match="some-org/colour: neither a directory here nor a model"):
        qst_finetune.main(cfg)
    assert not (tmp_path / "run").exists()
