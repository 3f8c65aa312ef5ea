"""A server of several processes: one has the engine, the others answer requests."""
