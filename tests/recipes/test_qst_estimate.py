"""`tune run qst_estimate`, and its mistakes in this process."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig
from qst_tune.recipes import qst_estimate

from qst_tune.config.check import config_problems
from qst_tune.config.file import parse_config
from qst_tune.config.keys import keys_of
from qst_tune.config.schema import EstimateConfig
from qst_tune.errors import UserError
from qst_tune.models.build import build_any_on_meta
from tests.support.configs import typed_config
from tests.support.published import write_published
from tests.support.recipe_runs import tune_here

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for pattern in ("*/*_qst.yaml", "*/*_peqa_*.yaml")
    for path in (ROOT / "configs").glob(pattern)
)
SMALL = ("batch_size=1", "tokenizer.max_seq_len=32")
FAST = (*SMALL, "depths=false")


def test_estimate_prints_tables_and_writes_figures(tmp_path: Path) -> None:
    result = tune_here(
        "run",
        "qst_estimate",
        "--config",
        "smollm2/135M_qst",
        f"output_dir={tmp_path}/out",
        *FAST,
        "num_processes=4",
        "backbone_sharding=full",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    # 28.3 M parameters of the embedding in bf16, 106.2 M in 8 bits: 162.8 MB for four.
    assert "each of 4 processes, backbone_sharding=full: backbone 0.04 GiB" in result.stdout
    content = json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert content["estimate"]["title"] == "QST, recomputed"
    memory = content["estimate"]["cost"]["memory"]
    assert sum(memory["parts"].values()) == memory["num_bytes"]


@pytest.mark.slow
def test_estimate_has_a_line_for_each_depth(tmp_path: Path) -> None:
    run = ("run", "qst_estimate", "--config", "smollm2/135M_qst", f"output_dir={tmp_path}/out")
    result = tune_here(*run, *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    own, *_, every = json.loads((tmp_path / "out" / "estimate.json").read_text())["depths"]
    assert (own["lora_layers"], every["lora_layers"]) == (0, 30)
    assert " 0*" in result.stdout


def settings(*overrides: str) -> DictConfig:
    config = str(ROOT / "configs" / "smollm2" / "135M_qst.yaml")
    return parse_config(["--config", config, *overrides])


def test_unknown_length_of_rows_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qst_estimate.log, "propagate", True)
    cfg = typed_config(settings("tokenizer.max_seq_len=null"), EstimateConfig)
    assert qst_estimate.request_of(cfg).shape.seq_len == qst_estimate.DEFAULT_SEQ_LEN
    assert "tokenizer.max_seq_len is null" in caplog.text


def test_estimate_says_which_batch_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (*FAST, "fit_gib=0.19", f"output_dir={tmp_path}/out")
    qst_estimate.main(settings(*given))
    content = json.loads((tmp_path / "out" / "estimate.json").read_text())
    fits = content["estimate"]["largest_batch"]
    assert fits > 0
    said = f"largest batch of 32 tokens a row that fits in 0.19 GiB: {fits}\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit_gib=-1", "fit_gib=-1 must be a number above 0"),
        ("device=tpu", "device=tpu cannot be estimated: use cpu or cuda"),
        ("dtype=fp8", "dtype=fp8 is not supported"),
        ("attention=flash", "attention=flash must be fused, plain or null"),
        ("batch_size=0", "batch_size=0 must be a whole number"),
        ("methods=[qlora]", "unknown key 'methods'"),
        ("tokenizer.max_seq_len=9000", "longer than the model's max_seq_len"),
        ("fit_gb=24", "did you mean 'fit_gib'"),
        ("model.reduction_factor=500", "reduction_factor=500"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        qst_estimate.main(settings(f"output_dir={tmp_path}/out", override))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "title"),
    [("135M_qst_sst2", "QST, classifier, rec"), ("135M_qst_dpo", "QST, DPO, rec")],
)
def test_classifiers_and_preferences_are_estimated(
    name: str, title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "configs" / "smollm2" / f"{name}.yaml")
    cfg = parse_config(["--config", config, f"output_dir={tmp_path}/out", *FAST])
    qst_estimate.main(cfg)
    assert title in capsys.readouterr().out


@pytest.mark.parametrize("name", CONFIGS)
def test_every_training_config_can_be_estimated(name: str, tmp_path: Path) -> None:
    """Its keys, components and model; the step itself is estimated for one of them above."""
    cfg = parse_config(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    if "checkpoint_dir" in cfg:  # their model is the directory's
        cfg.checkpoint_dir = write_published(tmp_path, name)
    assert config_problems(cfg, keys_of(EstimateConfig)) == []
    qst_estimate.request_of(typed_config(cfg, EstimateConfig))
    build_any_on_meta(cfg.model, qst_estimate.dtype_of(cfg.dtype))
