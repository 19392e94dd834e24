"""What is timed does the same work in one pass as in several."""

from benchmarks.backbones import BACKBONES
from benchmarks.side_networks import COUNTS, build, main, ways


def test_the_table_has_a_line_for_each_way(capsys) -> None:
    main(["--backbone", "tiny", "--rows", "4", "--prompt-tokens", "3", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("backbone ")
    assert lines[1].startswith("switching takes ")
    assert len(lines) == 4 + 1 + 2 * len(COUNTS) - 1
    assert lines[4].endswith("| 1.00 |")


def test_every_way_decodes_each_row_once() -> None:
    model = build(BACKBONES["tiny"], max(COUNTS))
    rows = []
    steps = ways(model, 16, 3)
    model.tok_embeddings.register_forward_hook(lambda m, args, out: rows.append(args[0].shape))
    for step in steps.values():
        rows.clear()
        step()
        assert all(shape[1] == 1 for shape in rows)
        assert sum(shape[0] for shape in rows) == 16
