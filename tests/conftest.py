import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# The tensors of the tests are tiny: threads cost more than they give (133 s against 12 s for one
# file on two busy cores). Recipes that run in a subprocess inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Triton decides at its first import whether kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# Two processes of a suite leave less than a GiB at any time.
MEMORY, NEEDED_BYTES = "/dev/shm", 4 * 2**30


def pytest_configure() -> None:
    """Take signals as a terminal's program does, and put files into memory if there is room.

    A disk takes 3 ms to flush or delete one.
    """
    # What is ignored stays so in a run: SIGHUP under nohup, SIGINT in a shell's background job.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > NEEDED_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)


def pytest_collection_finish() -> None:
    """Leave what is imported now out of collections: of a tiny run, each takes half the time.

    Loading a model collects. A million objects of torch and the tests are there for good.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Python's last collection takes all: nanobind would report what is left as leaked."""
    gc.unfreeze()


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton's kernels run: a GPU, or the interpreter, made to round to bf16 as a GPU does.

    The interpreter of Triton 3.9 cuts the lower bits off.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, rounding)
        rounded = torch.tensor(values.astype("float32")).bfloat16()
        return rounded.view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", nearest)
    return "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    """No loss curve is drawn: it takes longer than the steps of a tiny run.

    ``training/test_run_log.py``, and every run in a process of its own, draws it.
    """
    run_log = sys.modules.get("qst_tune.training.run_log")
    with pytest.MonkeyPatch.context() as patch:
        if run_log is not None:
            patch.setattr(run_log.RunSummary, "_plot", lambda *_: None)
        yield
