"""Conversations through chat templates: tokens, and which of them are learnt."""
