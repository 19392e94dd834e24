from benchmarks.study.pareto import Point, frontier, points_of
from tests.benchmarks.study.support import cost, line


def test_a_run_is_a_point_for_each_way_to_take_its_steps_that_was_measured():
    lines = [
        line("dial_10", 3e-3, 0, 87.0, steps=30),
        line("dial_10", 3e-3, 1, 86.0, steps=30),
        line("last_10", 3e-3, 0, 85.0, steps=30),
        line("qst", 3e-3, 0, 84.0, steps=30, rows=32),
        line("heads_4", 3e-3, 0, 83.0, steps=30),
    ]
    costs = [cost(n, 2.0, 300) for n in ("dial_10", "qst", "heads_4")]
    costs += [cost("dial_10_saved", 1.0, 500), cost("dial_10_by_row", 3.0, 200, device="cuda")]
    points = points_of("sst2", lines, costs)
    assert points == [
        Point("dial_10", 1.0, 300, 86.5, steps=30),
        Point("dial_10_saved", 0.5, 500, 86.5, steps=30),
    ]


def test_times_of_other_threads_and_devices_are_not_mixed():
    lines = [line("dial_10", 3e-3, 0, 87.0, steps=30), line("qlora", 1e-3, 0, 89.0, steps=30)]
    with_the_dial = [cost("dial_10", 2.0, 300, threads=1), cost("qlora", 6.0, 700, threads=1)]
    for costs in (with_the_dial, [*with_the_dial, cost("qlora", 2.0, 700), cost("qst", 1.0, 90)]):
        assert [(p.method, p.minutes) for p in points_of("sst2", lines, costs)] == [
            ("qlora", 3.0),
            ("dial_10", 1.0),
        ]
    assert points_of("sst2", lines, [cost("qlora", 2.0, 700)]) == []


POINTS = [
    Point("a", 1, 900, 80),
    Point("b", 2, 800, 85),
    Point("c", 3, 100, 84),
    Point("d", 4, 850, 90),
]


def test_the_frontier_is_better_than_all_that_takes_no_more():
    def names(axis, *, higher_is_better):
        best = frontier(POINTS, axis, higher_is_better=higher_is_better)
        return [point.method for point in best]

    assert names("minutes", higher_is_better=True) == ["a", "b", "d"]
    assert names("mib", higher_is_better=True) == ["c", "b", "d"]
    assert names("minutes", higher_is_better=False) == ["a"]


def test_of_equal_costs_the_better_one_is_on_the_frontier():
    points = [Point("a", 1, 1, 80), Point("b", 1, 1, 85)]
    assert [p.method for p in frontier(points, "mib", higher_is_better=True)] == ["b"]
