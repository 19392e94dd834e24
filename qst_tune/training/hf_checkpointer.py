"""Reads the weights of any Hugging Face folder that ``backbone_from_hf`` builds a decoder for."""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from torchtune import training
from torchtune.training.checkpointing._utils import safe_torch_load

from qst_tune.errors import UserError
from qst_tune.models.hf.families import read_architecture
from qst_tune.models.hf.folder import weight_files
from qst_tune.models.hf.hub import model_name
from qst_tune.models.hf.weights import Weights


class HFCheckpointer:
    """A torchtune checkpointer for which the folder says everything.

    It finds the weight files itself, one, shards with an index, or shards alone, prefers
    safetensors, and reads ``.bin`` files as weights only, which runs no code. The conversion is the
    one of the folder's ``config.json``::

        checkpointer:
          _component_: qst_tune.training.hf_checkpointer.HFCheckpointer
          checkpoint_dir: ${checkpoint_dir}

    Args:
        checkpoint_dir (str): the folder; nothing of its weights is read yet.
        cache_dir (str | None): another folder, where the recipe keeps the quantised backbone for
            its next start; None keeps nothing.

    Attributes:
        name (str): of the model, as the beginning of a file's name.
        cache_dir (Path | None): as given.

        folder (Path): as given.

    Raises:
        UserError: if weight files are missing or cut off.
    """

    def __init__(self, checkpoint_dir: str, cache_dir: str | None = None) -> None:
        folder = Path(checkpoint_dir)
        self.name = model_name(folder)[0].replace("/", "--")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.folder = folder
        self._config = (folder / "config.json").read_bytes()
        self._paths = weight_files(folder)

    @cached_property
    def _convert(self) -> Callable[[Weights], Weights]:
        # Here, since a backbone of transformers is loaded without it.
        return read_architecture(self.folder).convert

    @property
    def identity(self) -> str:
        """Tells one state of the folder from another, without reading the weights."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        return hashlib.sha256(self._config + repr(files).encode()).hexdigest()

    def load_checkpoint(self) -> dict[str, Any]:
        """Read all files.

        Returns:
            dict[str, Any]: the weights under torchtune's names, below its ``MODEL_KEY``.

        Raises:
            UserError: as :meth:`load_files`.
        """
        weights: Weights = {}
        for part in self.load_files():
            weights.update(part)
        return {training.MODEL_KEY: weights}

    def load_files(self) -> Iterator[Weights]:
        """Read one file after the other.

        Yields:
            Weights: of a file, under torchtune's names.

        Raises:
            UserError: if a file cannot be read, or has a weight that the architecture has not.
        """
        for path in self._paths:
            yield self._load(path)

    def _load(self, path: Path) -> Weights:
        try:
            weights = safe_torch_load(path)
        except ValueError as error:
            # The reader's error says what is wrong; what torchtune wraps around it does not.
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(f"{path} is damaged, or holds more than weights: {reason}") from error
        try:
            return self._convert(weights)
        except Exception as error:  # torchtune's own are bare
            raise UserError(f"{path} does not fit its config.json: {error}") from error

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: neither QST nor PEQA writes a whole model this way.

        Args:
            *args (Any): not looked at.
            **kwargs (Any): not looked at.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("HFCheckpointer only reads; tuned models are saved by the recipe")
