"""The JSON file of a run: filled as measurements come, and continued by the next run."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.backbones import BACKBONES
from benchmarks.costs import Cost
from benchmarks.statistics import Spread, paired_ratio
from benchmarks.timing import Round, Shape

PACKAGES = ("torch", "torchtune", "torchao")


class OtherSettingsError(ValueError):
    """The file holds measurements that cannot stand beside those asked for."""


@dataclass
class Results:
    """All that was measured.

    Args:
        path (Path): of the file.
        settings (dict[str, Any]): what must agree for two measurements to stand in one table.
        commands (list[str]): that filled it.
        rounds (dict[Shape, list[Round]]): step times.
        costs (dict[str, dict[Shape, Cost]]): the rest, by method.
    """

    path: Path
    settings: dict[str, Any]
    commands: list[str] = field(default_factory=list)
    rounds: dict[Shape, list[Round]] = field(default_factory=dict)
    costs: dict[str, dict[Shape, Cost]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any] | None = None) -> "Results":
        """Continue a file, or begin one.

        Args:
            path (Path): of the file.
            settings (dict[str, Any] | None): of the run; None takes the file's.

        Returns:
            Results: what is there already.

        Raises:
            OtherSettingsError: if the file's settings are others.
        """
        if not path.exists():
            return cls(path, settings or {})
        stored = json.loads(path.read_text())
        if settings is not None and stored["settings"] != settings:
            differing = [k for k, v in settings.items() if stored["settings"].get(k) != v]
            raise OtherSettingsError(
                f"{path} was measured with another {', '.join(differing)}; use --fresh to "
                "replace it or --results for another folder"
            )
        return cls(
            path,
            stored["settings"],
            stored["commands"],
            {Shape.parse(k): [Round(**r) for r in v] for k, v in stored["rounds"].items()},
            {
                name: {Shape.parse(k): Cost(**cost) for k, cost in by_shape.items()}
                for name, by_shape in stored["costs"].items()
            },
        )

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {
            "settings": self.settings,
            "commands": self.commands,
            "rounds": {str(k): [asdict(r) for r in v] for k, v in self.rounds.items()},
            "costs": {
                name: {str(k): asdict(cost) for k, cost in by_shape.items()}
                for name, by_shape in self.costs.items()
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.path)

    def seconds(self, shape: Shape, method: str) -> list[float]:
        """Step times of a method, one per round.

        Args:
            shape (Shape): of the batch.
            method (str): its name.

        Returns:
            list[float]: empty if it was not measured.
        """
        rounds = self.rounds.get(shape, [])
        return [r.seconds[method] for r in rounds if method in r.seconds]

    def ratio(self, shape: Shape, method: str, reference: str) -> Spread | None:
        """Compare the step times of two methods within each round that has both.

        Args:
            shape (Shape): of the batch.
            method (str): whose time is above the line.
            reference (str): whose time is below it.

        Returns:
            Spread | None: None if they were never measured together.
        """
        rounds = [r.seconds for r in self.rounds.get(shape, [])]
        both = [seconds for seconds in rounds if method in seconds and reference in seconds]
        if not both:
            return None
        return paired_ratio([s[method] for s in both], [s[reference] for s in both])

    def limit_gflops(self) -> list[float]:
        """Speeds of the big matrix product.

        Returns:
            list[float]: one per round.
        """
        return [r.limit_gflops for rounds in self.rounds.values() for r in rounds]


def machine_settings(backbone: str, threads: int) -> dict[str, Any]:
    """Describe what measurements depend on.

    Args:
        backbone (str): key of :data:`~benchmarks.backbones.BACKBONES`.
        threads (int): of torch.

    Returns:
        dict[str, Any]: for :class:`Results`.
    """
    return {
        "backbone": asdict(BACKBONES[backbone]),
        "threads": threads,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
