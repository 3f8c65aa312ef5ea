"""What a device does between a step and the guesses of a head that follow it."""

MOST = 7  # guesses after a step
COLUMNS = 8  # of a row of guesses: a cache line's worth
