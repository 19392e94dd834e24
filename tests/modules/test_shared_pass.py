"""Side networks that take turns over one frozen pass compute what each computes alone."""

import pytest
import torch

from qst_tune.models import qst_decoder
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.modules.shared_pass import SharedPass, frozen_part
from qst_tune.modules.side.network import SideNetwork
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

KINDS = {
    "default": {"num_side_blocks": 2},
    "paper": {"variant": "paper"},  # does not normalise
    "one block": {"num_side_blocks": 1, "downsample": "avgpool"},
    "dial": {"num_side_blocks": 2, "lora_layers": 1, "lora_rank": 2},
    "deep dial": {"num_side_blocks": 1, "lora_layers": 2, "lora_rank": 2},
    "lora": {"num_side_blocks": 0, "lora_layers": 1, "lora_rank": 2},
}


def side_of(kind: str, dtype: torch.dtype = torch.float32) -> QSTDecoder:
    torch.manual_seed(0)
    model = qst_decoder(tiny_backbone(dtype=dtype), reduction_factor=TINY_REDUCTION, **KINDS[kind])
    randomize_(model.side)
    return model


def outcome(model: QSTDecoder, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(tokens)
    logits.square().mean().backward()
    return [
        logits.detach(),
        *(p.grad.clone() for p in model.side.parameters() if p.grad is not None),
    ]


def in_turn(
    kinds: list[str], tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[list[list[torch.Tensor]], SharedPass]:
    model, sides = side_of(kinds[0], dtype), [side_of(kind, dtype).side for kind in kinds]
    shared = model.shared_pass = SharedPass(sides)
    shared.begin(len(sides))
    found = []
    for side in sides:
        model.side = side
        found.append(outcome(model, tokens))
    return found, shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kinds",
    [
        ["default", "default", "one block"],
        ["paper", "default", "one block"],
        ["default", "dial", "deep dial", "lora"],
        ["dial", "deep dial"],
        ["lora", "lora"],
    ],
    ids=" + ".join,
)
def test_each_computes_what_it_does_alone_over_one_pass(
    kinds: list[str], dtype: torch.dtype
) -> None:
    tokens = random_tokens(2, 7)
    found, shared = in_turn(kinds, tokens, dtype)
    assert shared.num_passes == 1
    for kind, actual in zip(kinds, found, strict=True):
        expected = outcome(side_of(kind, dtype), tokens)
        assert len(actual) == len(expected) > 1
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), kind


def test_another_batch_is_another_pass_and_equal_tokens_are_the_same_one() -> None:
    model = side_of("default")
    shared = model.shared_pass = SharedPass([model.side, model.side])
    shared.begin(3)
    tokens, others = random_tokens(2, 7), random_tokens(2, 7) + 1
    for batch in (tokens, others, tokens.clone(), others[:1]):
        with torch.no_grad():
            actual = model(batch)
        assert torch.equal(actual, side_of("default")(batch).detach())
    assert shared.num_passes == 3


def test_the_last_reader_frees_what_was_kept() -> None:
    _, shared = in_turn(["default", "one block"], random_tokens(2, 7))
    assert shared._passes == []


def test_a_single_reader_keeps_nothing() -> None:
    model = side_of("default")
    shared = model.shared_pass = SharedPass([model.side])
    model(random_tokens(2, 7))
    assert (shared.num_passes, shared._passes) == (1, [])


@pytest.mark.parametrize("recompute", [False, True])
def test_networks_that_normalise_save_one_tensor_for_all(recompute: bool) -> None:
    model = side_of("default")
    sides = [side_of("default").side for _ in range(3)]
    shared = model.shared_pass = SharedPass(sides)
    shared.begin(3)
    tokens, saved = random_tokens(2, 7), []
    num_state = tokens.numel() * model.backbone.width
    for side in sides:
        side.recompute, model.side = recompute, side
        own: dict[int, torch.Tensor] = {}  # kept, so that no address is used twice

        def note(tensor: torch.Tensor, own: dict[int, torch.Tensor] = own) -> torch.Tensor:
            if tensor.numel() == num_state and not tensor.requires_grad:
                own[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(tokens)
        saved.append(own)
    reads = 1 + len(sides[0].layers)  # h_0 and what each block reads
    assert len(saved[0].keys() & saved[1].keys() & saved[2].keys()) == reads


def test_the_frozen_part_is_what_any_of_them_needs() -> None:
    def part(*kinds: str) -> tuple[list[int], int | None]:
        sides: list[SideNetwork] = [side_of(kind).side for kind in kinds]
        return frozen_part(sides)

    num_layers = len(side_of("default").layers)
    own = [layer + 1 for layer in side_of("default").side.layers]
    assert part("default") == ([0, *own], None)
    assert part("lora") == ([], num_layers - 1)
    assert part("lora", "default") == (sorted({0, *own, num_layers - 1}), None)
    assert part("lora", "deep dial")[1] == num_layers - 1
    assert num_layers - 2 in part("lora", "deep dial")[0]
