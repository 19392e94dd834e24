"""What the estimate says of several processes, against what they hold and send."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qst_tune.distributed.processes import sum_gradients
from qst_tune.distributed.sharding import backbone_bytes, group_bytes
from qst_tune.estimation.spread import Spread, spread_line
from qst_tune.modules.memory import GIB
from tests.distributed.test_sharding import MODELS, build, load_sharded, own_tokens
from tests.support.hf_models import save_hf_model
from tests.support.ranks import on_ranks
from tests.support.traffic import Traffic


def received(traffic: Traffic, size: int) -> int:
    """Each process sends its part to the others, and receives one of the same size from each."""
    return sum(num_bytes for *_, num_bytes in traffic.messages) * (size - 1)


def estimate_is_what_happens(directory: Path, kind: str, size: int) -> None:
    spread, plan, model = Spread(size, "full"), build(kind), load_sharded(directory, kind)
    held = sum(p.to_local().nbytes for p in model.parameters() if not p.requires_grad)
    model(own_tokens()).sum().backward()
    with Traffic() as step:
        model(own_tokens()).sum().backward()
    if kind == "nf4, dial":
        with Traffic() as pairs:
            model.with_reference(own_tokens())[0].sum().backward()
        planned = spread.gathered_bytes(plan, has_reference=True)
        assert planned == pytest.approx(received(pairs, size), rel=0.02)
    trained = [p for p in model.parameters() if p.requires_grad]
    with Traffic() as update:
        sum_gradients(trained)
    # A row more or less of each tensor, and padding to equal rows.
    assert spread.backbone_bytes(plan) == pytest.approx(held, rel=0.02)
    assert spread.gathered_bytes(plan) == pytest.approx(received(step, size), rel=0.02)
    message = sum(num_bytes for *_, num_bytes in update.messages)
    assert spread.gradient_bytes(plan) == 2 * message * (size - 1) // size


@pytest.mark.parametrize("kind", ["nf4, dial", "fp4, tied", "peqa"])
def test_bytes_held_and_received_are_those_of_a_real_step(kind: str, tmp_path: Path) -> None:
    save_hf_model(tmp_path / "model", MODELS[kind][0])
    on_ranks(2, estimate_is_what_happens, tmp_path / "model", kind, 2)


@pytest.fixture
def model() -> Any:
    return build("nf4")


def test_groups_add_up_to_the_backbone(model: Any) -> None:
    groups, rest = group_bytes(model)
    assert len(groups) == 1 + len(model.layers)
    assert sum(groups) + rest == backbone_bytes(model)
    head = model.output.weight.nbytes + model.norm.scale.nbytes
    assert rest == head


def test_peak_has_a_share_of_the_backbone_and_two_groups_more(model: Any) -> None:
    groups, rest = group_bytes(model)
    whole = sum(groups) + rest
    peak = Spread(8, "full").peak_bytes(model, whole + 1000)
    assert peak == 1000 + -(-whole // 8) + rest + 2 * max(groups)


def test_without_sharding_only_gradients_are_sent(model: Any) -> None:
    spread = Spread(4, None)
    assert spread.backbone_bytes(model) == backbone_bytes(model)
    assert (spread.peak_bytes(model, 7), spread.gathered_bytes(model)) == (7, 0)
    assert spread.gradient_bytes(model) > 0


def test_accumulated_batches_gather_again_and_sum_gradients_once(model: Any) -> None:
    once, thrice = Spread(4, "full"), Spread(4, "full", accumulation=3)
    assert thrice.gathered_bytes(model) == 3 * once.gathered_bytes(model)
    assert thrice.gradient_bytes(model) == once.gradient_bytes(model)


def test_line_names_every_figure(model: Any) -> None:
    assert torch.get_default_dtype() == torch.float32
    line = spread_line(Spread(2, "full"), model, 3 * GIB)
    assert line.startswith(
        "each of 2 processes, backbone_sharding=full: backbone 0.00 GiB, peak at"
    )
    assert "of frozen weights and" in line
    assert line.endswith("MiB of gradients")
