"""transformers' command line, with side networks known to it.

Example::

    python -m qst_tune.transformers serve runs/135M_qst/side_network --port 8000
"""

import sys
from importlib import import_module

import transformers

from qst_tune.terminal import safe_streams
from qst_tune.transformers import QSTForCausalLM


def main() -> None:
    """Run transformers' command on the arguments of this one."""
    sys.argv[0] = "transformers"
    # `serve` of transformers 5.23 asks no registry: it looks the class up here by its name.
    transformers.QSTForCausalLM = QSTForCausalLM  # type: ignore[attr-defined]
    with safe_streams():
        import_module("transformers.cli.transformers").main()


if __name__ == "__main__":
    main()
