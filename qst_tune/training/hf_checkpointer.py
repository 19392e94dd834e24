"""Reads the weights of any Hugging Face folder that ``backbone_from_hf`` builds a decoder for."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from torchtune import training

from qst_tune.backbone.loading import directory_format
from qst_tune.backbone.weights_file import read_weights_file
from qst_tune.errors import UserError
from qst_tune.models.hf.families import Architecture, read_architecture
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
        folder (Path): the model's.

    Raises:
        UserError: if weight files are missing or cut off, or a quantised directory has a cache.
    """

    def __init__(self, checkpoint_dir: str, cache_dir: str | None = None) -> None:
        folder = Path(checkpoint_dir)
        self.name = model_name(folder)[0].replace("/", "--")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.folder = folder
        self._config = (folder / "config.json").read_bytes()
        self._paths = weight_files(folder)
        if cache_dir is not None and directory_format(folder) is not None:
            raise UserError(
                f"checkpointer.cache_dir={cache_dir}: {folder} is quantised already, so there is "
                "nothing to keep; set it to null"
            )

    @cached_property
    def _architecture(self) -> Architecture:
        # Here, since a backbone of transformers is loaded without it.
        return read_architecture(self.folder)

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
        if "output.weight" in weights and self._architecture.tied:
            weights.setdefault("tok_embeddings.weight", weights.pop("output.weight"))
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
        weights = read_weights_file(path)
        try:
            return self._architecture.convert(weights)
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
