"""A captured pass gives what a plain one does, in tensors that no later pass overwrites."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qst_tune.modules.captured_pass import CapturedPass, Replay, SharedTensors, Unfinished
from tests.support.stand_in_graphs import StandInGraphs

WIDTH = 5


@pytest.fixture
def parameters() -> nn.ParameterList:
    return nn.ParameterList([torch.randn(7, WIDTH), torch.randn(3)])


def inputs(batch: int = 2, length: int = 3) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(7, (batch, length)), "scale": torch.rand(batch, length, 1)}


def compute_with(parameters: nn.ParameterList):
    """Two outputs: with a gradient for the first parameter, and without one."""

    def compute(tokens, scale):
        embedded = parameters[0][tokens]
        return (embedded * scale).tanh(), embedded.detach() + scale

    return compute


def captured(parameters, shared=None, **size) -> CapturedPass:
    shared = shared or SharedTensors(parameters, most_tokens=20)
    return CapturedPass(
        compute_with(parameters), inputs(**size), [parameters], shared, StandInGraphs()
    )


def replay(one: CapturedPass, given) -> tuple[torch.Tensor, ...]:
    return Replay.apply(one, given, [Unfinished()], *one.parameters)


def test_outputs_and_gradients_are_those_of_plain_passes_which_add_up(parameters):
    one = captured(parameters)
    batches = [inputs() for _ in range(3)]
    weights = torch.randn(2, 3, WIDTH)
    for given in batches:
        outputs = replay(one, given)
        (outputs[0] * weights).sum().backward()
        plain = compute_with(parameters)(**given)
        assert [o.requires_grad for o in outputs] == [True, False]
        assert all(torch.equal(*pair) for pair in zip(outputs, plain, strict=True))
    found, parameters[0].grad = parameters[0].grad, None
    for given in batches:
        (compute_with(parameters)(**given)[0] * weights).sum().backward()
    assert torch.equal(found, parameters[0].grad)
    assert parameters[1].grad is None  # nothing depends on it


def test_what_a_pass_returned_stays_when_another_runs(parameters):
    shared = SharedTensors(parameters, most_tokens=20)
    first, second = captured(parameters, shared), captured(parameters, shared, length=5)
    outputs = replay(first, inputs())
    outputs[0].sum().backward()
    kept = [t.clone() for t in (*outputs, parameters[0].grad)]
    gradient, parameters[0].grad = parameters[0].grad, None
    replay(second, inputs(length=5))[0].sum().backward()
    replay(first, inputs())[0].sum().backward()
    assert all(torch.equal(*pair) for pair in zip(kept, (*outputs, gradient), strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_pass_that_overflows_is_recorded_all_the_same(parameters, value):
    with torch.no_grad():
        parameters[0].fill_(value)
    one = captured(parameters)
    given = inputs() | {"tokens": torch.zeros(2, 3, dtype=torch.long)}
    found, plain = replay(one, given), compute_with(parameters)(**given)
    torch.testing.assert_close(found, plain, rtol=0.0, atol=0.0, equal_nan=True)


def test_in_no_grad_mode_only_the_forward_pass_is_recorded(parameters):
    device = StandInGraphs()
    shared = SharedTensors(parameters, most_tokens=20)
    with torch.no_grad():
        one = CapturedPass(compute_with(parameters), inputs(), [parameters], shared, device)
    assert device.num_records == 1
    given = inputs()
    plain = compute_with(parameters)(**given)
    assert all(torch.equal(*pair) for pair in zip(one.forward(given), plain, strict=True))


def test_a_pass_no_longer_fits_parameters_that_have_moved(parameters):
    one = captured(parameters)
    with torch.no_grad():
        parameters[0].mul_(2)
    assert one.fits(parameters)
    assert not one.fits([nn.Parameter(parameter.detach().clone()) for parameter in parameters])
    parameters[0].data = parameters[0].data.clone()
    assert not one.fits(parameters)


@pytest.mark.parametrize(("shift", "is_right"), [(0.0, True), (1e-3, False)])
def test_where_plain_passes_differ_a_recorded_one_may_as_much(parameters, shift, is_right):
    """Sums of atomic additions come in any order: here they are a few last bits off."""
    others = torch.Generator().manual_seed(5)

    def compute(tokens, scale):
        embedded = parameters[0][tokens]
        noise = torch.rand(embedded.shape, generator=others)
        return ((embedded + 1e-6 * noise) * scale,)

    class Graphs(StandInGraphs):
        def record(self, work):
            replay = super().record(work)

            def replay_and_shift():
                replay()
                next(iter(shared._flat.values())).add_(shift)

            return replay_and_shift

    shared = SharedTensors(parameters, most_tokens=20)
    given = inputs(batch=4, length=5)
    with torch.no_grad(), nullcontext() if is_right else pytest.raises(ValueError, match="other"):
        CapturedPass(compute, given, [parameters], shared, Graphs())


def test_results_that_differ_now_and_then_count_together(parameters):
    """Of many sums of atomic additions each is the same in most passes, never all of them."""
    others = torch.Generator().manual_seed(5)

    def compute(tokens, scale):
        results = [parameters[0][tokens] * scale + n for n in range(40)]
        for n in torch.randint(40, (3,), generator=others).tolist():
            results[n] = results[n] * (1 + 1e-6)
        return tuple(results)

    with torch.no_grad():
        shared = SharedTensors(list(parameters), most_tokens=20)
        CapturedPass(compute, inputs(), [parameters], shared, StandInGraphs())


def test_a_record_meets_no_node_of_autograd_of_an_earlier_loss(parameters):
    """On a GPU such a node belongs to another stream, and its recording fails."""
    compute, seen = compute_with(parameters), []

    def seeing(tokens, scale):
        seen.append(parameters[0])
        return compute(tokens, scale)

    loss = compute(**inputs())[0].sum()
    loss.backward()
    own, device = parameters[0], StandInGraphs()
    shared = SharedTensors(list(parameters), most_tokens=20)
    one = CapturedPass(seeing, inputs(), [parameters], shared, device)
    assert len({id(leaf) for leaf in (own, *seen)}) == 1 + len(seen) > 2
    assert {leaf.data_ptr() for leaf in seen} == {own.data_ptr()}
    assert parameters[0] is own
    assert one.parameters[0] is own


def test_a_pass_goes_backward_once(parameters):
    outputs = replay(captured(parameters), inputs())
    outputs[0].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        outputs[0].sum().backward()


def test_memory_does_not_grow_with_the_number_of_shapes(parameters):
    shared = SharedTensors(parameters, most_tokens=20)
    first = captured(parameters, shared, batch=4, length=5)
    second = captured(parameters, shared, batch=2, length=3)
    assert [t.shape for t in second.outputs] == [(2, 3, WIDTH)] * 2
    for large, small in zip(first.outputs, second.outputs, strict=True):
        assert large.untyped_storage().nbytes() == 20 * WIDTH * 4
        assert small.data_ptr() == large.data_ptr()
    assert len({t.data_ptr() for t in (*first.outputs, *first.output_gradients)}) == 3
