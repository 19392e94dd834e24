"""Lines of results, as a run writes them."""

from typing import Any


def line(method: str, rate: float, seed: int, held_out: float, **changes: Any) -> dict[str, Any]:
    """A run of two steps on SST-2."""
    return {
        "task": "sst2",
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": 2,
        "held_out": held_out,
        "held_out_loss": 0.5,
        "trained": 1000,
        "tokens": 64,
        "batch_size": 16,
        "rows": None,
        "device": "cpu",
        "states": False,
        "seconds": [2.0],
        "curve": [1.0, 0.5],
        **changes,
    }


def cost(method: str, seconds: float, mib: int, **changes: Any) -> dict[str, Any]:
    """What a step on SST-2 takes."""
    return {
        "task": "sst2",
        "method": method,
        "batch_size": 16,
        "tokens": 32.0,
        "seconds": seconds,
        "peak_bytes": mib << 20,
        "device": "cpu",
        **changes,
    }
