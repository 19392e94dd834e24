"""The dial's methods: names, costs and defaults."""

from typing import Any, cast

import pytest

from benchmarks.study.methods import BACKBONES, DEPTHS, GROUPS, METHODS, NUM_LAYERS, settings


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_setting_is_a_method_and_none_trains_nothing(backbone: str) -> None:
    names = {(s.depth, s.side): s.name for s in settings(backbone)}
    assert set(names) == {(k, side) for k in DEPTHS for side in (True, False)} - {(0, False)}
    assert names[0, True] == f"qst{backbone}"
    assert GROUPS[f"dial{backbone}"] == list(names.values())
    assert set(names.values()) <= METHODS.keys()


def test_a_step_costs_two_forwards_of_each_layer_that_trains_or_one_with_activations_saved() -> (
    None
):
    for k in DEPTHS[1:]:
        for name in (f"dial_{k}", f"last_{k}_nf4"):
            assert METHODS[name].forwards == pytest.approx(1 + 2 * k / NUM_LAYERS)
            for rows in ("by_row", "by_2_rows", "by_8_rows"):
                assert METHODS[f"{name}_{rows}"].forwards == METHODS[name].forwards
            assert METHODS[f"{name}_saved"].forwards == pytest.approx(1 + k / NUM_LAYERS)
    assert METHODS["last_30"].forwards == METHODS["qlora_checkpointed"].forwards


def test_equal_time_is_that_of_checkpointed_qlora() -> None:
    assert METHODS["qst"].steps_of_equal_time(50) == 150
    assert METHODS["dial_15"].steps_of_equal_time(50) == 75
    assert METHODS["dial_15_saved"].steps_of_equal_time(50) == 100
    assert METHODS["qlora_checkpointed"].steps_of_equal_time(50) == 50


def test_lora_has_the_same_rate_beside_a_side_network_and_alone() -> None:
    for task in ("sst2", "wikitext2"):
        # At a third of the other's: qst_tune.training.methods.parameter_groups.
        ratio = METHODS["dial_6"].rate_for(task) / METHODS["last_6"].rate_for(task)
        assert ratio == pytest.approx(3, rel=0.12)


def test_what_takes_the_same_steps_in_another_way_is_named_after_a_method() -> None:
    others = {name: method.same_as for name, method in METHODS.items() if method.same_as}
    assert others["dial_3_nf4_saved"] == "dial_3_nf4"
    assert others["qlora_by_row"] == "qlora"
    assert all(METHODS[same].same_as is None for same in others.values() if same)


def test_a_name_says_how_many_rows_run_at_a_time() -> None:
    for suffix, rows in (("by_row", 1), ("by_2_rows", 2), ("by_4_rows", 4), ("by_8_rows", 8)):
        build = cast(Any, METHODS[f"dial_20_{suffix}"].build)
        assert build.keywords["rows"] == rows
        assert build.keywords["lora_layers"] == 20
