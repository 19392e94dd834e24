"""The PEQA model is torchtune's decoder with another kind of linear, and knows its task."""

import pytest
import torch
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from qst_tune.models import peqa_decoder
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.peqa_model import PEQADecoder
from tests.support.numbers import losses_of_steps, random_tokens, randomize_, tiny_backbone

GROUPS = [None, 32]


def tiny_model(group_size=None, *, bits=4, tied=False, **settings):
    return peqa_decoder(tiny_backbone(tied=tied), bits=bits, group_size=group_size, **settings)


def dense_copy(model, *, tied=False):
    """torchtune's own decoder with the decoded weights."""
    dense = tiny_backbone(tied=tied)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PEQALinear):
            state[f"{name}.weight"] = module.dense_weight(torch.float32)
            for part in ("codes", "weight_scale", "zero_point"):
                del state[f"{name}.{part}"]
    dense.load_state_dict(state)
    return dense


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_logits_are_those_of_torchtunes_decoder_with_the_decoded_weights(group_size, tied):
    model, tokens = tiny_model(group_size, tied=tied), random_tokens()
    expected = dense_copy(model, tied=tied)(tokens)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


def test_chunked_and_skipped_heads_give_the_same_logits():
    model, tokens = tiny_model(), random_tokens()
    logits = model(tokens)
    model.set_num_output_chunks(3)
    torch.testing.assert_close(torch.cat(model(tokens), dim=1), logits)
    model.set_num_output_chunks(0)
    model.skip_output_layer = True
    assert torch.equal(model.output(model(tokens)).float(), logits)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("recompute", [True, False])
def test_every_scale_learns_and_nothing_else_changes(group_size, recompute):
    model, tokens = tiny_model(group_size), random_tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if recompute:
        policy = {TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    loss_function = LinearCrossEntropyLoss()
    loss_function.set_model_output(model)

    def loss() -> torch.Tensor:
        return loss_function(model(tokens)[:, :-1], tokens[:, 1:])

    losses = losses_of_steps(loss, model.task().values(), lr=1e-3, num_steps=4)
    assert losses == sorted(losses, reverse=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (not name.endswith("weight_scale")), name


def test_recomputation_changes_neither_loss_nor_gradients_nor_names():
    tokens = random_tokens()
    gradients, names = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = tiny_model()
        if recompute:
            policy = {TransformerSelfAttentionLayer}
            training.set_activation_checkpointing(model, auto_wrap_policy=policy)
        model(tokens).square().mean().backward()
        names.append(list(model.task()))
        gradients.append([p.grad for p in model.task().values()])
    assert names[0] == names[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_torchtunes_adapter_protocol_finds_what_trains():
    for settings in ({}, {"train_zero_points": True}):
        model = tiny_model(**settings)
        assert get_adapter_params(model).keys() == model.task().keys()
        model.requires_grad_(False)
        set_trainable_params(model, get_adapter_params(model))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == get_adapter_params(model).keys()


@pytest.mark.parametrize("group_size", GROUPS)
def test_a_task_is_exchanged_in_place_and_back_bit_for_bit(group_size):
    model, tokens = tiny_model(group_size), random_tokens()
    codes = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items() if "codes" in n}
    a = {name: value.detach().clone() for name, value in model.task().items()}
    b = {name: value * 1.1 for name, value in a.items()}
    logits = model(tokens)
    model.load_task(b)
    assert not torch.allclose(model(tokens), logits)
    model.load_task(a)
    assert torch.equal(model(tokens), logits)
    state = model.state_dict()
    for name, (address, content) in codes.items():
        assert state[name].data_ptr() == address
        assert torch.equal(state[name], content)


def test_another_models_task_is_refused():
    model, other = tiny_model(), tiny_model(32)
    before = {name: value.detach().clone() for name, value in model.task().items()}
    with pytest.raises(ValueError, match="not those that train in this model"):
        model.load_task(other.task())
    assert all(torch.equal(value, before[name]) for name, value in model.task().items())


def test_a_decoder_without_integer_linears_is_refused():
    with pytest.raises(ValueError, match="needs at least one integer linear"):
        PEQADecoder(tiny_backbone())


def test_generation_with_a_cache_agrees_with_the_whole_sequence():
    model = tiny_model()
    randomize_(model.tok_embeddings)
    tokens = random_tokens(batch=1, length=6)
    whole = model(tokens)
    with torch.device("cpu"):
        model.setup_caches(1, torch.float32, decoder_max_seq_len=6)
    mask = torch.tril(torch.ones(6, 6, dtype=torch.bool))
    for position in range(6):
        logits = model(
            tokens[:, position : position + 1],
            mask=mask[None, position : position + 1],
            input_pos=torch.tensor([[position]]),
        )
        torch.testing.assert_close(logits[:, 0], whole[:, position], rtol=1e-4, atol=1e-4)
