"""Rows with different side networks in one batch give what they give alone."""

import pytest
import torch
from torchtune.modules.peft import disable_adapter

from qst_tune.generation.caches import GrowingCache, attached, attentions
from qst_tune.models import qst_decoder
from qst_tune.modules.side.per_row import share_backbone
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

# Different in all that may differ: width, downsampler, gates, mix, and what is read of a state.
CHOICES = {
    "default": {},
    "paper": {"variant": "paper", "num_side_blocks": 3, "downsample": "avgpool"},
    "wide": {"reduction_factor": 2, "downsample": "linear", "gate_per_channel": True},
    "deep": {"lora_layers": 1, "lora_rank": 3, "apply_lora_to_mlp": False},
    "deeper": {"lora_layers": 2, "lora_rank": 2, "lora_attn_modules": ["q_proj", "output_proj"]},
}


@pytest.fixture
def models():
    """One model a side network, over equal backbones."""
    built = {}
    backbone = tiny_backbone()
    for name, choices in CHOICES.items():
        settings = {"reduction_factor": TINY_REDUCTION, "num_side_blocks": 3, **choices}
        other = tiny_backbone()
        other.load_state_dict(backbone.state_dict())
        built[name] = qst_decoder(other, **settings).eval()
        randomize_(built[name].side)
    return built


@pytest.fixture
def shared(models):
    """The first of them, with the side networks of all."""
    model = models["default"]
    share_backbone(model, {name: other.side for name, other in models.items()})
    return model


@torch.no_grad()
def alone(models, name, row, **where):
    """Logits of a row by the model of one network; None: of the backbone."""
    if name is None:
        model = models["paper"]
        model.side.disabled = True
        logits = model(row, **where)
        model.side.disabled = False
        return logits
    if name == "default":  # its model is the shared one
        side = models["default"].side
        models["paper"].side, kept = side.networks[0], models["paper"].side
        logits = models["paper"](row, **where)
        models["paper"].side = kept
        return logits
    return models[name](row, **where)


ROWS = ["wide", None, "deeper", "paper", "default", "deep", "wide"]


@torch.no_grad()
def test_every_row_gives_the_logits_it_gives_alone(models, shared) -> None:
    tokens = random_tokens(batch=len(ROWS))
    shared.side.use(ROWS)
    together = shared(tokens)
    for number, name in enumerate(ROWS):
        expected = alone(models, name, tokens[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], expected, rtol=1e-4, atol=1e-5)
    assert len({row.argmax().item() for row in together[:, -1]}) > 1


@torch.no_grad()
def test_rows_keep_their_own_mask_and_positions(models, shared) -> None:
    tokens, length = random_tokens(batch=3, length=8), 8
    keep = torch.ones(3, length, dtype=torch.bool)
    keep[0, :3] = keep[2, :1] = False
    mask = keep[:, None] & torch.ones(length, length).tril().bool() | torch.eye(length).bool()
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    shared.side.use(["paper", "default", "wide"])
    together = shared(tokens, mask=mask, input_pos=positions)
    for number, name in enumerate(["paper", "default", "wide"]):
        row = slice(number, number + 1)
        where = {"mask": mask[row], "input_pos": positions[row]}
        expected = alone(models, name, tokens[row], **where)
        torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_go_on_from_caches(shared) -> None:
    tokens = random_tokens(batch=len(ROWS), length=9)
    shared.side.use(ROWS)
    whole = shared(tokens)
    caches, pieces = [GrowingCache() for _ in attentions(shared)], []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        positions = torch.arange(start, stop)
        mask = (positions[:, None] >= torch.arange(stop))[None]
        with attached(attentions(shared), caches):
            pieces.append(shared(tokens[:, start:stop], mask=mask, input_pos=positions[None]))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [*CHOICES, None])
def test_one_name_serves_batches_of_any_size(name, models, shared) -> None:
    shared.side.use(name if name else [None] * 2)
    tokens = random_tokens(batch=2)
    expected = alone(models, name, tokens)
    torch.testing.assert_close(shared(tokens), expected, rtol=1e-4, atol=1e-5)
    if name:
        assert shared(tokens[:1]).shape[0] == 1


@torch.no_grad()
def test_disabled_it_is_the_plain_backbone(models, shared) -> None:
    tokens = random_tokens()
    with disable_adapter(shared):
        assert torch.equal(shared(tokens), alone(models, None, tokens))
    assert not torch.equal(shared(tokens), alone(models, None, tokens))


def test_a_batch_trains_the_networks_of_its_rows_only(shared) -> None:
    shared.side.use(["paper", "wide"])
    shared(random_tokens(batch=2)).square().mean().backward()
    grads = {
        name: any(p.grad is not None and p.grad.any() for p in network.parameters())
        for name, network in zip(shared.side.names, shared.side.networks, strict=True)
    }
    assert grads == {name: name in ("paper", "wide") for name in CHOICES}


def test_mistakes_are_reported(shared) -> None:
    with pytest.raises(ValueError, match="no side network 'french'; loaded: default, paper, wide"):
        shared.side.use(["paper", "french"])
    shared.side.use(["paper", "wide"])
    with pytest.raises(ValueError, match=r"named 2 rows, the batch has 3"):
        shared(random_tokens(batch=3))
    with pytest.raises(ValueError, match="at least one side network"):
        share_backbone(shared, {})
    other = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, num_side_blocks=1)
    with pytest.raises(ValueError, match=r"read the same layers \(a: \[0, 1, 2\], b: \[2\]\)"):
        share_backbone(shared, {"a": shared.side.networks[0], "b": other.side})
