from benchmarks.study.page import best_rates, write_page


def line(method, rate, seed, held_out, **changes):
    return {
        "task": "sst2",
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": 2,
        "held_out": held_out,
        "held_out_loss": 0.5,
        "trained": 1000,
        "tokens": 64,
        "batch_size": 16,
        "curve": [1.0, 0.5],
        **changes,
    }


LINES = [
    line("qst", 1e-3, 0, 80.0),
    line("qst", 3e-3, 0, 90.0),
    line("qst", 3e-3, 1, 84.0),
    line("qlora", 3e-4, 0, 86.0),
    line("qlora", 3e-4, 0, 60.0, steps=0, curve=[]),
]


def test_each_method_stands_at_the_rate_with_the_best_mean():
    groups = best_rates(LINES, "sst2")
    assert [(g[0]["method"], g[0]["rate"], g[0]["steps"], len(g)) for g in groups] == [
        ("qst", 3e-3, 2, 2),
        ("qlora", 3e-4, 2, 1),
        ("qlora", 3e-4, 0, 1),
    ]


def test_a_loss_is_better_when_lower():
    lines = [line("qst", 1e-3, 0, 2.0), line("qst", 3e-3, 0, 1.0), line("lora", 1, 0, 1.5)]
    assert [g[0]["held_out"] for g in best_rates(lines, "alpaca")] == [1.0, 1.5]


COSTS = [
    {
        "task": "sst2",
        "method": "qst",
        "batch_size": 16,
        "tokens": 32.0,
        "seconds": 90.0,
        "peak_bytes": 7 << 20,
    }
]


def test_another_number_of_rows_is_another_line():
    lines = [line("qst", 3e-3, 0, 80.0), line("qst", 3e-3, 0, 85.0, batch_size=64)]
    assert [g[0]["batch_size"] for g in best_rates(lines, "sst2")] == [64, 16]


def test_the_page_shows_mean_and_spread_and_what_it_cost(tmp_path):
    write_page(LINES, COSTS, tmp_path)
    page = (tmp_path / "study.md").read_text()
    # 2 steps of 90 seconds
    assert "| QST | 1,000 | 0.003 | 2 | 87.0 (84.0 to 90.0) | 2 | 0.5000 | 64 | 3.0 | 7 |" in page
    assert "| QLoRA, rank 16, before training |" in page
    assert "| QLoRA, rank 16 | 1,000 | 0.0003 | 2 | 86.0 | 1 | 0.5000 | 64 | - | - |" in page
    assert "| sst2 | QST | 16 | 32 | 90.00 | 7 |" in page
    assert (tmp_path / "study.png").stat().st_size > 1000
