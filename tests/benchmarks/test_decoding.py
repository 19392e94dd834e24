"""The two that are compared decode the same rows, and what is told of their times is right."""

import torch

from benchmarks.decoding import Decoding, main, milliseconds_by_turns, relative_speed
from benchmarks.methods import CPU, qst_model


def test_the_table_has_a_line_for_each_number_of_rows(capsys) -> None:
    main(["--backbone", "tiny", "--rows", "1", "3", "--prompt-tokens", "4", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["rows", "---", "1", "3"]
    assert lines[-1].count("%") == 3


def test_a_step_decodes_the_token_behind_the_prompt_from_caches() -> None:
    model = qst_model("tiny")
    model.initialize_side(CPU)
    model.eval()
    seen = []
    decoding = Decoding(model, lambda: seen.append("asked"), num_rows=2, num_prompt_tokens=5)
    prompt = torch.ones(2, 5, dtype=torch.long)
    for _ in range(2):
        expected = model(torch.cat([prompt, decoding.tokens], 1))[:, -1].argmax(-1, keepdim=True)
        decoding.step()
        assert torch.equal(decoding.tokens, expected)
        assert {cache.length for cache in decoding.caches._own} == {6}
    assert seen == ["asked"] * 3


def test_each_is_timed_as_often_and_begins_by_turns() -> None:
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = milliseconds_by_turns(steps, 3)
    assert "".join(order) == "abbaabba"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_speed_is_taken_from_neighbours() -> None:
    alone, beside = [9.0, 90.0, 8.0, 10.0], [10.0, 100.0, 10.0, 10.0]
    assert relative_speed(alone, beside) == (0.9, 0.9, 0.9)
