"""What a frozen backbone makes of a batch, computed once: all side networks read the same states.

A variant of the side network then costs its own part alone, about a tenth of a step. Losses are
those of a run without: the same numbers are read instead of computed.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qst_tune.modules.base_quantization import quantization_of
from qst_tune.modules.qst_decoder import QSTDecoder

_NORM = "norm"


class FrozenStates:
    """Keeps a backbone's states in files, one for each batch, named by the batch's tokens.

    Args:
        model (QSTDecoder): its backbone runs through this object from now on.
        folder (Path): of files for this checkpoint; each format of the weights has its own below.
    """

    def __init__(self, model: QSTDecoder, folder: Path) -> None:
        # What the side network reads of a layer: its output, or its input, the output before it.
        before = model.side.reads == "input"
        read = [layer - before for layer in model.side.layers if layer >= before]
        layers: Any = model.layers
        self.names: dict[nn.Module, str] = {layers[i]: str(i) for i in read}
        self.names[model.norm] = _NORM
        self.layers = set(layers) | {model.norm}
        self.folder = folder / quantization_of(layers).replace(", ", "_").replace(" ", "_")
        self.states: dict[str, torch.Tensor] = {}
        self.is_known = False
        self._compute = model._frozen
        model._frozen = self._run  # type: ignore[method-assign]

    @contextmanager
    def of(self, tokens: torch.Tensor) -> Iterator[None]:
        """Take the states of a batch from its file, or make the file if there is none.

        Args:
            tokens (torch.Tensor): ``[B, T]``; the model runs on them in the block, once.

        Yields:
            None: while the states are those of these tokens.
        """
        path = self._path(tokens)
        self.states = _read(path, set(self.names.values()))
        self.is_known = len(self.states) == len(self.names)
        yield
        if not self.is_known:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({**_read(path), **self.states}, path)
        self.states = {}

    def _path(self, tokens: torch.Tensor) -> Path:
        content = str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()
        return self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"

    def _run(self, module: nn.Module, x: torch.Tensor, **per_row: Any) -> torch.Tensor:
        """Stand in for ``QSTDecoder._frozen``; a layer that nobody reads gives back its input."""
        if self.is_known and module in self.layers:
            return self.states[self.names[module]] if module in self.names else x
        output = self._compute(module, x, **per_row)
        if module in self.names:
            self.states[self.names[module]] = output.contiguous()
        return output


def _read(path: Path, names: set[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file, all or those named; none if there is no file."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return {n: file.get_tensor(n) for n in sorted(file.keys()) if names is None or n in names}
