r"""The command lines of transformers and of EleutherAI's harness, with side networks known to them.

Examples::

    python -m qst_tune.transformers serve runs/135M_qst/side_network --port 8000
    python -m qst_tune.transformers lm_eval --model hf \
        --model_args pretrained=runs/135M_qst/side_network --tasks arc_easy
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import constants

from qst_tune.terminal import safe_streams
from qst_tune.transformers import QSTForCausalLM


def main() -> None:
    """Run transformers' command, or the harness, on the arguments of this one."""
    if sys.argv[1:2] == ["lm_eval"]:
        _run_harness()
        return
    # `serve` of transformers 5.23 asks no registry: it looks the class up here by its name.
    transformers.QSTForCausalLM = QSTForCausalLM  # type: ignore[attr-defined]
    if sys.argv[1:2] == ["serve"]:
        _list_what_is_served()
    sys.argv[0] = "transformers"
    with safe_streams():
        import_module("transformers.cli.transformers").main()


def _run_harness() -> None:
    try:
        harness = import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: install EleutherAI's harness, the extra eval")
    sys.argv = sys.argv[1:]
    harness.cli_evaluate()


def _list_what_is_served() -> None:
    """Let ``/v1/models`` answer with the model that every request must name.

    transformers 5.23 lists the models of the hub cache instead, and answers 500 without a cache.
    """
    manager = import_module("transformers.cli.serving.model_manager").ModelManager
    cached = manager.get_gen_models

    def get_gen_models(self: Any, cache_dir: str | None = None) -> list[dict[str, Any]]:
        if self.force_model is not None:
            return [{"id": self.force_model, "object": "model", "owned_by": "", "created": 0}]
        found: list[dict[str, Any]] = []
        if Path(cache_dir or constants.HF_HUB_CACHE).is_dir():
            found = cached(cache_dir)
        return found

    manager.get_gen_models = get_gen_models


if __name__ == "__main__":
    main()
