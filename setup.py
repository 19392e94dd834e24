"""Lists the packages; everything else about the distribution is in pyproject.toml."""

from setuptools import find_packages, setup

# pyproject.toml can either find packages or name them, not both, and qst_tune.recipes and
# qst_tune.configs lie outside the directory qst_tune (see `package-dir` there).
setup(packages=[*find_packages(include=["qst_tune*"]), "qst_tune.recipes", "qst_tune.configs"])
