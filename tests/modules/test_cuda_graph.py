"""Work that is recorded on a GPU is done when it is replayed, and what cannot be is refused."""

import pytest
import torch

from qst_tune.modules.cuda_graph import CudaGraphs

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.fixture
def graphs() -> CudaGraphs:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return CudaGraphs(DEVICE)


def test_recorded_work_is_done_at_each_replay_and_not_before(graphs):
    x, total = torch.arange(4.0, device=DEVICE), torch.zeros(4, device=DEVICE)
    replay = graphs.record(lambda: total.add_(x * 2))
    assert total.tolist() == [0, 0, 0, 0]
    replay()
    x.fill_(1)
    replay()
    assert total.tolist() == [2, 4, 6, 8]
    assert graphs.pool_bytes() > 0


def test_a_recording_that_fails_leaves_the_stream_that_was_in_use(graphs):
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        graphs.record(lambda: torch.ones(1, device=DEVICE).item())
    assert torch.cuda.current_stream() == before


def test_all_graphs_of_a_device_are_recorded_in_one_stream(graphs):
    assert CudaGraphs(DEVICE)._stream == graphs._stream


def test_work_that_waits_for_the_device_is_refused_and_nothing_else_is(graphs):
    x = torch.ones(4, device=DEVICE)
    graphs.rehearse(lambda: x.add_(1))
    with pytest.raises(RuntimeError):
        graphs.rehearse(lambda: x.sum().item())
    assert x.sum().item() == 8  # waiting is allowed again


def test_replays_draw_what_plain_work_draws(graphs):
    x, out = torch.ones(1000, device=DEVICE), torch.empty(1000, device=DEVICE)

    def work():
        out.copy_(torch.nn.functional.dropout(x, 0.5))

    torch.manual_seed(3)
    plain = []
    for _ in range(3):
        work()
        plain.append(out.clone())
    torch.manual_seed(3)
    with graphs.same_random_numbers():
        graphs.rehearse(work)
        replay = graphs.record(work)
    for expected in plain:
        replay()
        assert torch.equal(out, expected)
