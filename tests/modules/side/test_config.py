"""The configuration of a side network: checked when it is made, filled in from its variant."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from qst_tune.modules.side.config import VARIANTS, SideConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "other"}, "variant='other' is unknown; choose one of default, paper, authors"),
        ({"downsample": "conv"}, "'conv' is unknown; choose one of linear, lora, adapter"),
        ({"output_mix": "sum"}, "'sum' is unknown; choose one of residual, alpha, sigmoid, "),
        ({"activation": "tanh"}, "activation='tanh' is unknown; choose one of silu, relu"),
        ({"hidden_bits": 5}, "hidden_bits=5 must be 16 or 8"),
        ({"dropout": -0.1}, "dropout=-0.1 must be at least 0 and below 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": -2, "downsample": "lora"}, "rank=-2 must be at least 1"),
        ({"initial_gamma": "mean"}, "initial_gamma='mean' must be a number"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        SideConfig(**settings)


def test_kinds_without_a_rank_take_any() -> None:
    assert SideConfig(rank=0, downsample="maxpool").rank == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_fills_in_what_is_open_and_nothing_else(variant) -> None:
    resolved = SideConfig(variant=variant, rank=5, output_mix="alpha").resolved(100, 8)
    for name, value in VARIANTS[variant].items():
        own = {"rank": 5, "output_mix": "alpha", "num_side_blocks": value or 8}
        assert getattr(resolved, name) == own.get(name, value)
    assert None not in [getattr(resolved, field.name) for field in fields(SideConfig)]
    assert resolved.resolved(100, 8) == resolved


def test_a_small_backbone_bounds_the_variants_values_but_not_a_users() -> None:
    resolved = SideConfig().resolved(8, 3)
    assert (resolved.rank, resolved.num_side_blocks) == (8, 3)
    chosen = SideConfig(rank=32, num_side_blocks=5).resolved(8, 3)
    assert (chosen.rank, chosen.num_side_blocks) == (32, 5)


def test_it_goes_through_a_model_block_and_back() -> None:
    config = SideConfig(reduction_factor=8, variant="paper", dropout=0.5)
    block = {"_component_": "any", "checkpoint_dir": "any", **config.settings()}
    assert config.settings() == {"reduction_factor": 8, "variant": "paper", "dropout": 0.5}
    assert SideConfig.of_block(block) == config
    assert SideConfig().settings() == {"reduction_factor": 16}


def test_it_cannot_be_changed_in_place() -> None:
    config = SideConfig()
    with pytest.raises(FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]
    assert replace(config, rank=3).rank == 3
