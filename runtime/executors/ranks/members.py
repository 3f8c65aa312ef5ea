"""The processes of ranks: how they are started, told apart and ended."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from socket import socketpair

from slipstream.interpreter import interpreter
from slipstream.runtime.executors.ranks.region import Region

# With -P, lest files of the working directory, perhaps a stranger's engine, be taken for modules.
_OPTIONS = ("-P", "-m")
PAUSE = 0.25  # seconds between two looks at ranks


@dataclass(frozen=True, slots=True)
class Member:
    """A process, and what is said to it."""

    process: subprocess.Popen[bytes]
    link: Connection


def start(program: str, setup: Callable[[int], object], descriptors: Sequence[int]) -> Member:
    """Start a module as a process that has these open files, and send it what ``setup`` makes of
    the descriptor of its end of the link."""
    here, there = socketpair()
    with there:
        told = setup(there.fileno())
        # In a session of its own: a terminal's Ctrl-C is for the engine's process.
        process = subprocess.Popen(
            (interpreter(), *_OPTIONS, program),
            stdin=subprocess.PIPE,
            pass_fds=(there.fileno(), *descriptors),
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(pickle.dumps(told))
        process.stdin.flush()
    except BrokenPipeError:  # it has ended, which is noticed where it is waited for
        pass
    return Member(process, Connection(here.detach()))


def ended(members: Mapping[int, Member], ranks: int) -> str | None:
    """How the first of these ranks ended that has; None where all run."""
    for rank, member in members.items():
        code = member.process.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            return named([rank], ranks, how)
    return None


def named(members: Sequence[int], ranks: int, what: str) -> str:
    """What is told of some ranks."""
    return f"rank {' and '.join(map(str, members))} of {ranks} {what}. Restart the engine"


def kill(members: Sequence[Member]) -> None:
    """End processes, without waiting until they have."""
    for member in members:
        member.process.kill()


def end(members: list[Member]) -> None:
    """End all processes, and forget them."""
    kill(members)
    for member in _taken(members):
        member.process.wait()
        member.link.close()
        if member.process.stdin is not None:
            member.process.stdin.close()


def finish(process: int, members: list[Member], regions: Sequence[Region]) -> None:
    """Let go of everything, in the ``process`` that started the members."""
    if os.getpid() != process:  # it was forked from the one whose ranks they are
        return
    end(members)
    for region in regions:
        region.close()


def _taken(members: list[Member]) -> Iterator[Member]:
    while members:
        yield members.pop()


def end_with_the_engine() -> None:
    """End this process, whatever it does, when the engine's process has ended: in a thread of a
    rank, whose standard input that one holds open."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
