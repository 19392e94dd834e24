"""Recipes: scripts that ``tune run`` executes, each readable from top to bottom.

Installed as ``qst_tune.recipes``. The table in ``qst_tune/plugin.py`` names those that ``tune ls``
lists.
"""
