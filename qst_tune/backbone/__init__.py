"""Frozen decoders of transformers, loaded quantised, for side networks to read."""
