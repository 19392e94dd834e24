"""The study of perplexities runs to its end on a tiny model, and continues where it stopped."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torchtune.models.llama3_2 import llama3_2

from benchmarks import wikitext
from tests.support.checkpoints import SIZES, write_model_directory

WORDS = "red green blue black white grey pink brown box colour what is the of it \n"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write_model_directory(tmp_path / "model")
    (tmp_path / "train.raw").write_text(WORDS * 20)
    (tmp_path / "test.raw").write_text(WORDS * 10)
    tiny = partial(wikitext.Setting, batch_size=2, seq_len=16, test_tokens=64)
    monkeypatch.setattr(wikitext, "Setting", tiny)
    monkeypatch.setattr(wikitext, "smollm2_135m", lambda: llama3_2(**SIZES))
    directories = ["--data", str(tmp_path), "--model", str(tmp_path / "model")]
    return [*directories, "--results", str(tmp_path / "results.json"), "--steps", "3"]


@pytest.mark.slow
def test_every_run_is_measured_once(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wikitext.main([*arguments, "--only", "unquantised,peqa3"])
    first = json.loads((tmp_path / "results.json").read_text())
    wikitext.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["runs"]) == list(wikitext.RUNS)
    assert all(results["runs"][name] == run for name, run in first["runs"].items())
    for name, run in results["runs"].items():
        assert len(run["train_loss"]) == (0 if name == "unquantised" else 3)
        assert (run["trained"] > 0) == (name != "unquantised")
        assert len(run["perplexity"]) == 1 + len(run["run"]["then_round"])
    assert "| lora, rounded to 3 bits, groups of 64 | " in capsys.readouterr().out


def test_results_of_other_settings_are_not_mixed(arguments: list[str]) -> None:
    wikitext.main([*arguments, "--only", "unquantised"])
    with pytest.raises(SystemExit, match=r"was measured with .*'steps': 3"):
        wikitext.main([*arguments[:-1], "4", "--only", "unquantised"])


@torch.no_grad()
def test_lora_is_merged_before_rounding(arguments: list[str], tmp_path: Path) -> None:
    model, trained = wikitext.load_dense(tmp_path / "model", "lora")
    model.float()  # without the autocast of a run
    for parameter in trained:
        parameter.normal_(std=0.1)
    tokens = torch.randint(0, 300, (2, 8))
    exact = model(tokens)
    before = [parameter.clone() for parameter in model.parameters()]
    fine = wikitext.rounded(model, 8, 32)(tokens)
    # Eight bits leave little rounding; without LoRA the logits are others altogether.
    assert (fine - exact).abs().mean() < 0.1 * exact.std()
    plain, _ = wikitext.load_dense(tmp_path / "model", "")
    assert (plain.float()(tokens) - exact).abs().mean() > 0.3 * exact.std()
    assert all(map(torch.equal, before, model.parameters()))
