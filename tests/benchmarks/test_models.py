"""The table of published models: their sizes, and the short way to their memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from benchmarks import models
from benchmarks.models import MODELS, Model, counted, main, peak_gib
from qst_tune.config.file import parse_config
from qst_tune.estimation.estimate import EstimateRequest
from qst_tune.estimation.step import Shape, own_setup
from qst_tune.modules.memory import GIB
from tests.support.configs import typed_config
from tests.support.model_types import tiny_config

SAMPLE = ["google/gemma-4-26B-A4B-it", "Qwen/Qwen3-VL-8B-Instruct", "zai-org/GLM-4-9B-0414"]
REST = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in SAMPLE]


@pytest.mark.parametrize("name", [*SAMPLE, *REST])
def test_sizes_give_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    AutoConfig.for_model(**MODELS[name].config).save_pretrained(tmp_path)
    assert counted(tmp_path) == pytest.approx(MODELS[name].billions, rel=0.02)


@pytest.mark.parametrize(
    "model_type", ["gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_the_short_way_to_the_peak_gives_that_of_the_estimate(
    model_type: str, tmp_path: Path
) -> None:
    settings = {"num_hidden_layers": 10, "vocab_size": 20_000}
    tiny_config(model_type, **settings).save_pretrained(tmp_path)
    shape = Shape(2, 64)
    raw = parse_config(["--config", str(models.CONFIG), f"checkpoint_dir={tmp_path}"])
    raw.model.embedding_quantization = "int8"
    cfg = typed_config(raw)
    request = EstimateRequest(lambda: own_setup(cfg, torch.bfloat16), cfg, shape, "cuda")
    whole = request.answer()[0].cost.memory.num_bytes
    assert peak_gib(tmp_path, shape, "int8") * GIB == pytest.approx(whole, abs=16 * 1024)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("Qwen/Qwen3-30B-A3B", 20), ("openai/gpt-oss-20b", 14)])
def test_a_mixture_fits_its_card(name: str, most: float, tmp_path: Path) -> None:
    AutoConfig.for_model(**MODELS[name].config).save_pretrained(tmp_path)
    assert peak_gib(tmp_path, Shape(4, 512), "none") < most


def test_the_command_prints_a_row_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny: dict[str, Any] = {
        "model_type": "smollm3",
        **tiny_config("smollm3", num_hidden_layers=8).to_diff_dict(),
    }
    monkeypatch.setitem(MODELS, "org/tiny", Model(0.0, tiny))
    assert main(["--only", "org/tiny", "--batch-size", "1", "--seq-len", "16"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| `org/tiny` | 0.00, 0 | 0.0 | ")
