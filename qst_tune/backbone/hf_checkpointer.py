"""The checkpointer of ``qst_from_hf`` and ``peqa_from_hf``: it only names their directory."""

import hashlib
from pathlib import Path

from qst_tune.backbone.directory_files import weight_files
from qst_tune.backbone.hub import model_name
from qst_tune.backbone.loading import directory_format
from qst_tune.errors import UserError


class HFCheckpointer:
    """A checkpointer that names the directory, which transformers reads.

    In a config::

        checkpointer:
          _component_: qst_tune.training.HFCheckpointer
          checkpoint_dir: ${checkpoint_dir}

    The recipe keeps the quantised backbone in ``cache_dir`` for its next start; None keeps nothing.
    UserError if weight files are missing or cut off, or a quantised directory has a cache.
    """

    def __init__(self, checkpoint_dir: str, cache_dir: str | None = None) -> None:
        directory = Path(checkpoint_dir)
        self.name = model_name(directory)[0].replace("/", "--")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._checkpoint_dir = directory  # torchtune's name
        self._config = (directory / "config.json").read_bytes()
        self.files = weight_files(directory)
        if cache_dir is not None and directory_format(directory) is not None:
            raise UserError(
                f"checkpointer.cache_dir={cache_dir}: {directory} is quantised already, so there "
                "is nothing to keep; set it to null"
            )

    @property
    def identity(self) -> str:
        """Identifies the state of the directory, without reading the weights."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hashlib.sha256(self._config + repr(files).encode()).hexdigest()

    def load_checkpoint(self) -> None:
        """Refuse, always with a UserError: torchtune's names are those of its own checkpointers."""
        raise UserError(
            "checkpointer: HFCheckpointer is for *_from_hf; with a builder over torchtune, such as "
            "qst_llama2_7b, use torchtune.training.FullModelHFCheckpointer"
        )
