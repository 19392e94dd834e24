"""Triton compiles kernels for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path


def compile_with_triton(script: str, cache: Path, *arguments: str) -> None:
    """Run a script that compiles, in a process that does not interpret kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", script, *arguments]
    subprocess.run(command, env=environment, check=True, timeout=300)
