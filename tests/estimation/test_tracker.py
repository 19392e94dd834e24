import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from qst_tune.estimation.tracker import PARTS, StorageTracker

KIB = 1024


def numbers(kib: int) -> torch.Tensor:
    """A tensor of that many KiB."""
    return torch.zeros(kib * KIB // 4)


def peak_kib(tracker: StorageTracker) -> float:
    return tracker.peak().num_bytes / KIB


def test_peak_is_the_most_that_is_alive_at_once() -> None:
    with StorageTracker() as tracker:
        tracker.enter("forward")
        a = numbers(4)
        b = a + 1  # 8 alive
        del a
        c = b + 1  # 8 again
        del b, c
        numbers(6)
    assert peak_kib(tracker) == 8


def test_views_and_operations_in_place_count_nothing() -> None:
    with StorageTracker() as tracker:
        tracker.enter("forward")
        a = numbers(4).view(32, -1)
        views = [a.t(), a[3:5], a.add_(1), a.expand(2, *a.shape), a.detach()]
    assert peak_kib(tracker) == 4
    assert len(views) == 5


def test_a_view_keeps_its_whole_storage_alive() -> None:
    with StorageTracker() as tracker:
        tracker.enter("forward")
        a = numbers(4)
        small = a[:1]
        del a
        b = numbers(4)
    assert peak_kib(tracker) == 8
    assert small.numel() == 1
    assert b.numel() == KIB


def test_sizes_are_rounded_up_to_the_allocators_granularity() -> None:
    with StorageTracker(granularity=512) as tracker:
        tracker.enter("forward")
        a, b = torch.zeros(1), torch.zeros(129)
    assert tracker.peak().num_bytes == 512 + 1024
    assert a.numel() + b.numel() == 130


def test_workspace_of_an_operation_counts_while_it_runs() -> None:
    with StorageTracker(workspace={torch.ops.aten.add: lambda *_: 6 * KIB}) as tracker:
        tracker.enter("forward")
        a = numbers(4)
        numbers(5)
        a.add(1)
    assert peak_kib(tracker) == 10  # the result is there only when the workspace is gone


def test_parts_add_up_and_are_what_they_are() -> None:
    weight = nn.Parameter(torch.zeros(32, 32))  # 4 KiB
    with StorageTracker() as tracker:
        tracker.register([weight], "trainable weights")
        hook = weight.register_post_accumulate_grad_hook(
            lambda p: tracker.register(p.grad, "gradients")
        )
        x = torch.zeros(64, 32)  # 8 KiB
        tracker.enter("forward")
        y = (x @ weight).exp()  # exp keeps its result, 8 KiB
        tracker.enter("loss")
        loss = y.square().sum()  # allocated by the loss, released before backward
        tracker.enter("backward")
        loss.backward()
    hook.remove()
    memory = tracker.peak()
    assert sum(memory.parts.values()) == memory.num_bytes
    assert set(memory.parts) == set(PARTS)
    assert memory.parts["trainable weights"] == 4 * KIB
    assert memory.saved_bytes == 16 * KIB  # x and y
    assert memory.start_bytes == 12 * KIB
    assert memory.phase == "backward"


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_optimizer_peaks_where_it_holds_copies(foreach: bool, fake: bool) -> None:
    with FakeTensorMode() if fake else torch.enable_grad():
        weights = [nn.Parameter(torch.zeros(1024)) for _ in range(4)]  # 4 KiB each
        optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, foreach=foreach)
        with StorageTracker() as tracker:
            tracker.register(weights, "trainable weights")
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            tracker.enter("optimizer")
            optimizer.step()
    # Weights, gradients and, after the first step, momentum; SGD works in place beyond that.
    assert peak_kib(tracker) == 3 * 16


def test_flops_are_those_of_torchs_counter() -> None:
    layer = nn.Linear(32, 48)
    q = torch.zeros(2, 4, 16, 8, requires_grad=True)

    def run() -> None:
        x = torch.zeros(5, 32, requires_grad=True)
        layer(x).sum().backward()
        q.matmul(q.transpose(2, 3)).sum().backward()

    with StorageTracker() as tracker:
        run()
    with FlopCounterMode(display=False) as counter:
        run()
    assert tracker.flops == counter.get_total_flops() > 0


def test_attention_of_the_cpu_counts_as_that_of_cuda() -> None:
    q = torch.zeros(2, 4, 64, 16, requires_grad=True)
    with StorageTracker() as tracker:
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    products = 2 * 2 * 4 * 64 * 64 * 16  # one [64, 16] x [16, 64] a head, as multiply and add
    assert tracker.flops == (2 + 5) * products  # backward computes the scores again
