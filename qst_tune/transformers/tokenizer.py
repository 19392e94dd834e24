"""The tokenizer of a side network is its backbone's, with the run's chat template."""

from typing import Any

from transformers import AutoTokenizer

from qst_tune.results.recipe_config import tuned_template
from qst_tune.transformers.config import (
    FETCHING,
    QSTConfig,
    backbone_directory,
    side_network_directory,
)


class BackboneTokenizer:
    """Stands in transformers' registry for the tokenizer of the backbone."""

    @classmethod
    def from_pretrained(cls, directory: str, *args: Any, **settings: Any) -> Any:
        """Load the tokenizer of a side network's backbone, with transformers' own arguments.

        ``backbone`` is the backbone's directory, if it is not where the side network's
        ``config.json`` says; what that names is downloaded with ``allow_download`` alone.
        """
        # What AutoTokenizer found out about this directory is not true of the backbone's.
        own = ("backbone", "config", "revision", "subfolder", "allow_download")
        public = {k: v for k, v in settings.items() if not k.startswith("_") and k not in own}
        fetching = {k: v for k, v in settings.items() if k in FETCHING and v is not None}
        home = side_network_directory(str(directory), **fetching)
        fetching.pop("revision", None)
        given = settings.get("backbone")
        backbone = given or QSTConfig.from_pretrained(home).backbone
        may = bool(given or settings.get("allow_download"))
        of_backbone = backbone_directory(
            backbone, home, "tokenizer", allow_download=may, **fetching
        )
        tokenizer = AutoTokenizer.from_pretrained(of_backbone, *args, **public)
        tuned = tuned_template(home, of_backbone)
        if tuned is not None and tuned.source is not None:
            tokenizer.chat_template = tuned.source
        return tokenizer
