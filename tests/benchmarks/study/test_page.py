from benchmarks.study.page import write_page
from tests.benchmarks.study.support import cost, line

LINES = [
    line("qst", 1e-3, 0, 80.0),
    line("qst", 3e-3, 0, 90.0),
    line("qst", 3e-3, 1, 84.0),
    line("qlora", 3e-4, 0, 86.0),
    line("qlora", 3e-4, 0, 60.0, steps=0, curve=[]),
]


COSTS = [cost("qst", 90.0, 7)]


def test_the_page_shows_mean_and_spread_and_what_it_cost(tmp_path):
    write_page(LINES, COSTS, tmp_path)
    page = (tmp_path / "study.md").read_text()
    # 2 steps of 90 seconds
    assert "| QST | 1,000 | 0.003 | 2 | 87.0 (84.0 to 90.0) | 2 | 0.5000 | 64 | 3.0 | 7 |" in page
    assert "| QLoRA, rank 16, before training |" in page
    assert "| QLoRA, rank 16 | 1,000 | 0.0003 | 2 | 86.0 | 1 | 0.5000 | 64 | - | - |" in page
    assert "| sst2 | QST | cpu, 2 threads | 16 | 32 | 90.00 | 7 |" in page
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_runs_of_the_dial_and_of_few_rows_stand_in_tables_of_their_own(tmp_path):
    write_page(LINES, COSTS, tmp_path)
    without = (tmp_path / "study.md").read_text()
    new = [line("dial_10", 3e-3, 0, 88.0, steps=200), line("qst", 3e-3, 0, 71.0, rows=32)]
    write_page([*LINES, *new], COSTS, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert "depth dial" not in without
    start, rest = page.split("## The depth dial")
    assert without.startswith(start)
    assert "88.0" in rest
    assert "71.0" in rest


def test_runs_of_the_dial_alone_make_a_page(tmp_path):
    write_page([line("dial_10", 3e-3, 0, 88.0, steps=200)], [], tmp_path)
    assert "study.png" not in (tmp_path / "study.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["study.md"]
