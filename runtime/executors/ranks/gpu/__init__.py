"""Engines of several ranks on GPUs: the first is the engine's own process, others follow it."""
