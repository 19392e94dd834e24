r"""The command lines of transformers and of EleutherAI's harness, with side networks known to them.

Examples::

    python -m qst_tune.transformers serve runs/135M_qst/side_network --port 8000
    python -m qst_tune.transformers lm_eval --model hf \
        --model_args pretrained=runs/135M_qst/side_network --tasks arc_easy
"""

import sys
from importlib import import_module

import qst_tune.transformers  # noqa: F401  # registers the models
from qst_tune.terminal import safe_streams


def main() -> None:
    """Run transformers' command, or the harness, on the arguments of this one."""
    if sys.argv[1:2] == ["lm_eval"]:
        _run_harness()
        return
    if sys.argv[1:2] == ["serve"]:
        import_module("qst_tune.transformers.serving").prepare_server(sys.argv[2:])
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


if __name__ == "__main__":
    main()
