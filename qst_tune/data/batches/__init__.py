"""From datasets to the batches of each step."""
