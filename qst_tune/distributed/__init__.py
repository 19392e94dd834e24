"""Several processes: who they are and what they exchange."""
