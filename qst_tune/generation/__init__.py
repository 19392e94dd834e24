"""Text from a tuned model: caches that live between turns, sampling, streaming, conversations."""
