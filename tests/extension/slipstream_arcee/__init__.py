"""Arcee for Slipstream, as a package of its own."""
