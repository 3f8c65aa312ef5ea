"""An engine in one process, and those who ask it in others.

Tokens are all that the engine's process says of an answer: text, stop strings and what becomes of
them belong to whoever asked.
"""
