"""Look into the folder of a run's result, check it, and make it ready for others."""
