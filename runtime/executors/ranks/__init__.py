"""An engine of several ranks: a process each, and what the engine's own process tells them."""
