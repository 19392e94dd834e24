"""Collectives on two processes, and that they do nothing on one."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from qst_tune.distributed.processes import (
    broadcast_tensors,
    gather_lists,
    is_main_process,
    process_group,
    rank_and_world_size,
    sum_gradients,
    sum_over_ranks,
)
from qst_tune.errors import UserError
from tests.support.ranks import on_ranks, rank_environment, unused_port


def test_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group(torch.device("cpu")):
        assert not dist.is_initialized()
        assert (rank_and_world_size(), is_main_process()) == ((0, 1), True)
        values = torch.tensor([1.0, 2.0])
        assert sum_over_ranks(values) is values
        assert torch.cat(gather_lists([values, values])).tolist() == [1, 2, 1, 2]
        module = nn.Linear(2, 2)
        module.weight.grad = torch.ones(2, 2)
        broadcast_tensors(module)
        sum_gradients(module.parameters())
        assert module.weight.grad.tolist() == [[1, 1], [1, 1]]
        assert module.bias.grad is None


def two_ranks(rank: int, port_file: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port_file}
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        torch.manual_seed(rank)
        module = nn.Linear(2, 3)
        broadcast_tensors(module)
        module.weight.grad = torch.full((3, 2), float(rank + 1))
        if rank == 0:  # on the other rank the bias has no gradient
            module.bias.grad = torch.tensor([1.0, 2.0, 3.0])
        sum_gradients(module.parameters())
        total = sum_over_ranks(torch.tensor([1.0 + rank]))
        # As of three validation batches on two ranks: two here, one there.
        gathered = torch.cat(gather_lists([torch.arange(3) + 10 * rank] * (2 - rank)))
        torch.save(
            {
                "ranks": (*rank_and_world_size(), is_main_process()),
                "weight": module.weight.detach(),
                "grads": [module.weight.grad, module.bias.grad],
                "total": total,
                "gathered": gathered,
            },
            f"{out}/{rank}.pt",
        )
    assert not dist.is_initialized()


def test_two_processes_agree(tmp_path: Path) -> None:
    mp.start_processes(two_ranks, (unused_port(), str(tmp_path)), 2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    expected = nn.Linear(2, 3).weight.detach()
    assert (first["ranks"], second["ranks"]) == ((0, 2, True), (1, 2, False))
    for result in (first, second):
        assert torch.equal(result["weight"], expected)
        assert torch.equal(result["grads"][0], torch.full((3, 2), 3.0))
        assert torch.equal(result["grads"][1], torch.tensor([1.0, 2.0, 3.0]))
        assert result["total"].item() == 3.0
        assert result["gathered"].tolist() == [0, 1, 2, 0, 1, 2, 10, 11, 12]


def one_dies(rank: int, port: str, out: str) -> None:
    os.environ |= rank_environment(rank, 2, port)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the first death brings on the other
    try:
        with process_group(torch.device("cpu")):
            sum_over_ranks(torch.ones(1))
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            sum_over_ranks(torch.ones(1))
    except UserError as error:
        Path(out).write_text(str(error))


def test_process_that_loses_another_says_so_in_one_line(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.start_processes(one_dies, (unused_port(), str(said)), 2, start_method="fork")
    text = said.read_text()
    assert text.startswith("process 0 has lost another process of this run")
    assert "Connection " in text  # closed or reset, by the system's mood
    assert "resume_from_checkpoint=True" in text
    assert len(text.splitlines()) == 1


def test_error_of_ones_own_stays_what_it_is() -> None:
    on_ranks(1, raises_its_own)


def raises_its_own() -> None:
    with pytest.raises(RuntimeError, match="mine"), process_group(torch.device("cpu")):
        raise RuntimeError("mine")
