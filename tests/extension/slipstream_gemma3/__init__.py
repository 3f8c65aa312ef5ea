"""Gemma 3 for Slipstream, as a package of its own."""
