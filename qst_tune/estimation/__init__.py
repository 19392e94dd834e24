"""Memory and cost of a training config before it runs."""
