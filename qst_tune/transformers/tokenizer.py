"""The tokenizer of a side network is its backbone's."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qst_tune.transformers.config import QSTConfig, local_folder


class BackboneTokenizer:
    """Stands in transformers' registry for the tokenizer of the backbone."""

    @classmethod
    def from_pretrained(cls, folder: str, *args: Any, **settings: Any) -> Any:
        """Load the tokenizer of a side network's backbone.

        Args:
            folder (str): of the side network.
            *args (Any): for transformers.
            **settings (Any): for transformers; ``backbone`` is the backbone's folder, if it is not
                where the side network's ``config.json`` says.

        Returns:
            Any: a transformers tokenizer.
        """
        # What AutoTokenizer found out about this folder is not true of the backbone's.
        own = ("backbone", "config", "revision", "subfolder")
        public = {k: v for k, v in settings.items() if not k.startswith("_") and k not in own}
        home = local_folder(str(folder))
        backbone = settings.get("backbone") or QSTConfig.from_pretrained(home).backbone
        return AutoTokenizer.from_pretrained(local_folder(backbone, Path(home)), *args, **public)
