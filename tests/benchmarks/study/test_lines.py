from benchmarks.study.lines import best_rates, cost_of, costs_by_key, figure_of
from tests.benchmarks.study.support import cost, line


def test_each_method_stands_at_the_rate_with_the_best_mean():
    lines = [
        line("qst", 1e-3, 0, 80.0),
        line("qst", 3e-3, 0, 90.0),
        line("qst", 3e-3, 1, 84.0),
        line("qlora", 3e-4, 0, 86.0),
        line("qlora", 3e-4, 0, 60.0, steps=0, curve=[]),
    ]
    groups = best_rates(lines)
    assert [(g[0]["method"], g[0]["rate"], g[0]["steps"], len(g)) for g in groups] == [
        ("qst", 3e-3, 2, 2),
        ("qlora", 3e-4, 2, 1),
        ("qlora", 3e-4, 0, 1),
    ]


def test_a_loss_is_better_when_lower():
    lines = [
        line(name, rate, 0, loss, task="alpaca")
        for name, rate, loss in [("qst", 1e-3, 2.0), ("qst", 3e-3, 1.0), ("lora", 1, 1.5)]
    ]
    assert [g[0]["held_out"] for g in best_rates(lines)] == [1.0, 1.5]


def test_a_rate_that_lost_with_seed_0_stays_behind_when_other_seeds_lower_the_mean():
    lines = [line("qst", 3e-3, 0, 90.0), line("qst", 3e-3, 1, 84.0), line("qst", 1e-3, 0, 89.0)]
    ((first, second),) = best_rates(lines)
    assert first["rate"] == second["rate"] == 3e-3


def test_of_a_run_that_was_made_twice_the_newest_counts():
    lines = [line("qst", 3e-3, 0, 90.0), line("qst", 3e-3, 1, 84.0), line("qst", 3e-3, 0, 88.0)]
    (seeds,) = best_rates(lines)
    assert [seed["held_out"] for seed in seeds] == [88.0, 84.0]


def test_another_number_of_rows_is_another_line():
    lines = [
        line("qst", 3e-3, 0, 80.0),
        line("qst", 3e-3, 0, 85.0, batch_size=64),
        line("qst", 3e-3, 0, 70.0, rows=32),
    ]
    groups = [(g[0]["batch_size"], g[0]["rows"]) for g in best_rates(lines)]
    assert groups == [(64, None), (16, None), (16, 32)]


def test_a_cost_is_that_of_the_lines_device():
    costs = costs_by_key([cost("qst", 1.0, 7), cost("qst", 0.1, 9, device="cuda")])
    run = line("qst", 1e-3, 0, 80.0, device="cuda")
    found = cost_of(run, costs)
    assert found is not None
    assert found["seconds"] == 0.1
    assert cost_of({**run, "method": "dial_3"}, costs) is None


def test_of_several_costs_that_with_the_most_threads_counts():
    two, one = cost("qst", 1.0, 7), cost("qst", 3.0, 7, threads=1)
    for costs in ([one, two], [two, one]):
        assert costs_by_key(costs) == {("sst2", "qst", 16, "cpu"): two}


def test_a_figure_has_the_digits_of_its_metric_and_a_range_for_several_seeds():
    assert figure_of([line("qst", 1e-3, 0, 81.26)]) == "81.3"
    losses = [line("qst", 1e-3, s, 1.5 + s / 10, task="alpaca") for s in range(3)]
    assert figure_of(losses) == "1.600 (1.500 to 1.700)"
