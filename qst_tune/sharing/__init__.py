"""Inspect the directory of a run's result, check it, and prepare it for others."""
