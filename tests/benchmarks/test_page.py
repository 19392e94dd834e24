from pathlib import Path

import pytest

from benchmarks.costs import Cost
from benchmarks.methods import METHODS, REFERENCE
from benchmarks.page import render_page
from benchmarks.plots import write_plots
from benchmarks.results import OtherSettingsError, Results, machine_settings
from benchmarks.statistics import Spread, paired_ratio, spread
from benchmarks.timing import Round, Shape

MAIN, LONG = Shape(4, 512), Shape(4, 1024)
MIB = 1024**2


def cost(above_frozen: int, *, seconds: float = 1.0) -> Cost:
    return Cost(
        frozen_bytes=100 * MIB,
        peak_bytes=(100 + above_frozen) * MIB,
        peak_rss_bytes=900 * MIB,
        flops_per_token=2e8,
        seconds=seconds,
        product_seconds=0.8 * seconds,
        backbone_product_seconds=0.75 * seconds,
        operation_seconds={"aten::mm": 0.8 * seconds},
    )


def synthetic(path: Path) -> Results:
    """The second round runs at half the speed, for all methods alike."""
    rounds = [
        Round({REFERENCE: 2.0, "qlora": 6.0, "lora": 3.0}, {}, limit_gflops=100.0),
        Round({REFERENCE: 4.0, "qlora": 12.0, "lora": 7.0}, {}, limit_gflops=50.0),
    ]
    costs = {
        REFERENCE: {MAIN: cost(50), LONG: cost(80)},
        "qlora": {MAIN: cost(500), LONG: cost(1000)},
        "qlora_checkpointed_best": {MAIN: cost(60), LONG: cost(120)},
    }
    settings = machine_settings("200m", threads=2)
    return Results(path, settings, ["python -m benchmarks"], {MAIN: rounds, LONG: rounds}, costs)


def test_spread_of_known_numbers() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([3.0, 1.0, 2.0]).text() == "2.00 (1.00-3.00)"


def test_ratios_are_paired_by_round() -> None:
    """The ratio of the medians, 9 / 3, would be right too; its spread, 6 / 4 to 12 / 2, not."""
    assert paired_ratio([6.0, 12.0], [2.0, 4.0]) == Spread(3.0, 3.0, 3.0)
    assert paired_ratio([3.0, 7.0], [2.0, 4.0]) == Spread(1.625, 1.5, 1.75)
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


def test_ratio_takes_only_rounds_with_both_methods(tmp_path: Path) -> None:
    results = synthetic(tmp_path / "r.json")
    results.rounds[MAIN].append(Round({REFERENCE: 1.0, "lora": 5.0}, {}, 1.0))
    assert results.ratio(MAIN, "qlora", REFERENCE) == Spread(3.0, 3.0, 3.0)
    assert results.ratio(MAIN, "full", REFERENCE) is None


def test_page_shows_numbers_and_verdicts(tmp_path: Path) -> None:
    page = render_page(synthetic(tmp_path / "2026-01-02.json"))
    assert "on 2026-01-02" in page
    assert "| QLoRA | 9.00 (6.00-12.00) | 228 | 3.00 (3.00-3.00) | 500 |" in page
    assert "| step faster than QLoRA, 4x512 | 2.3x | 3.00 (3.00-3.00) | yes |" in page
    assert "| step faster than LoRA, 4x512 | 1.8x | 1.62 (1.50-1.75) | **no** |" in page
    assert "our NF4 decoding, 4x512 | 1.0x | 1.20 | yes |" in page
    assert "our NF4 decoding, 4x1024 | 2.0x | 1.50 | **no** |" in page
    assert "| time in matrix products of backbone and head, 4x512 | 70% | 75% | yes |" in page
    assert f"**{METHODS[REFERENCE].title}**" in page


def test_pictures_are_drawn(tmp_path: Path) -> None:
    for path in write_plots(tmp_path, synthetic(tmp_path / "r.json")):
        assert path.stat().st_size > 5000


def test_results_are_continued_but_not_mixed(tmp_path: Path) -> None:
    results = synthetic(tmp_path / "directory" / "r.json")
    results.save()
    assert Results.open(results.path, results.settings) == results
    other = {**results.settings, "threads": 7}
    with pytest.raises(OtherSettingsError, match="another threads; use --fresh"):
        Results.open(results.path, other)
