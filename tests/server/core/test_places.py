"""Places that several processes share."""

from __future__ import annotations

import subprocess
import sys
import tempfile

from slipstream.server.core.places import Places

_TAKE = """
import sys
from slipstream.server.core.places import Places
places = Places(open(int(sys.argv[1]), "r+b", buffering=0), 2, 1)
print(sum(places.take(1, 1000) for _ in range(800)))
"""


def test_no_more_is_taken_than_there_is_and_what_the_dead_held_is_cleared() -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        places, number = Places(file, 2), file.fileno()
        command = [sys.executable, "-c", _TAKE, str(number)]
        with subprocess.Popen(command, pass_fds=[number], stdout=subprocess.PIPE) as other:
            mine = sum(places.take(1, 1000) for _ in range(800))
            assert other.stdout is not None
            theirs = int(other.stdout.read())
        assert mine + theirs == places.taken == places.requests == 1000
        assert places.own == mine
        places.clear(1)
        assert places.taken == mine and places.take(theirs, 1000)


def test_a_place_that_is_given_back_is_free() -> None:
    places = Places()
    assert places.take(3, 4) and not places.take(2, 4) and places.take(1, 4)
    places.give_back(3)
    assert (places.own, places.taken, places.requests) == (1, 1, 1)
