"""From a training config and its result to a directory for other programs."""

import json
from pathlib import Path

import pytest
import torch
from qst_tune.recipes import peqa_export, peqa_finetune
from transformers import AutoModelForCausalLM, AutoTokenizer

from qst_tune.errors import UserError
from qst_tune.models import peqa_llama3_2
from qst_tune.training.methods import TunedMethod, load_peqa
from tests.support.checkpoints import SIZES, Config, finetune_config
from tests.support.configs import typed_config
from tests.support.recipe_runs import merged, one_thread


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run that was trained."""
    root = tmp_path_factory.mktemp("export")
    config = {
        **finetune_config(root),
        "model": {"_component_": "qst_tune.models.peqa_llama3_2", **SIZES, "bits": 3},
    }
    with one_thread():
        peqa_finetune.main(merged(config, "epochs=4", "dataset_val=null"))
    return config


def export(config: Config, *overrides: str) -> None:
    with one_thread():
        peqa_export.main(merged(config, *overrides))


def rounded_model(config: Config) -> TunedMethod:
    with torch.device("meta"):
        model = peqa_llama3_2(**SIZES, bits=3)
    return load_peqa(model, typed_config(config), dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def test_the_dense_model_is_the_tuned_one(config: Config) -> None:
    export(config)
    directory = Path(config["output_dir"])
    method = rounded_model(config)
    method.load(directory / "scales")
    ours = method.model
    theirs = AutoModelForCausalLM.from_pretrained(directory / "dense")
    tokens = torch.randint(0, 300, (2, 12))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-3)
    assert AutoTokenizer.from_pretrained(directory / "dense").encode("what is it")


@torch.no_grad()
def test_without_scales_it_is_the_rounded_model(config: Config, tmp_path: Path) -> None:
    export(config, "scales=null", f"export_dir={tmp_path}/rounded")
    ours = rounded_model(config).model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
    tokens = torch.randint(0, 300, (2, 12))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-3)


def test_the_gptq_directory_says_what_it_is(config: Config, tmp_path: Path) -> None:
    export(config, f"export_dir={tmp_path}/gptq", "format=gptq")
    described = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert described["quantization_config"]["bits"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=awq"], "format=awq must be dense, gptq, gptq_v2 or null"),
        (["scales=absent"], r"absent is not a set of PEQA scales: it has no peqa_config\.json"),
        (["model.bits=4"], "was trained on another backbone .* 'int3, per channel, rtn' there"),
        (["formt=gptq"], "unknown key 'formt'; did you mean 'format'"),
    ],
)
def test_a_mistake_is_named(
    overrides: list[str], message: str, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(config, f"export_dir={tmp_path}/out", *overrides)
    assert list(tmp_path.iterdir()) == []
