"""transformers' command line, with side networks known to it.

Example::

    python -m qst_tune.transformers serve runs/135M_qst/side_network --port 8000
"""

import sys
from importlib import import_module

import qst_tune.transformers  # noqa: F401  # registers


def main() -> None:
    """Run transformers' command on the arguments of this one."""
    sys.argv[0] = "transformers"
    import_module("transformers.cli.transformers").main()


if __name__ == "__main__":
    main()
