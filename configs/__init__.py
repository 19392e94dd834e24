"""Configs of the recipes: ``<family>/<size>_<method>.yaml``.

Installed as ``qst_tune.configs``. This directory is a package only so that it can be found when
installed.
"""
