"""What a recipe composes: each file one step of a training run."""
