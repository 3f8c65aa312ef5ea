"""Compiles grammars in a process of its own first, which may hang, crash or fill its memory."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slipstream.errors import ExecutionError
from slipstream.interpreter import interpreters

_PROGRAM = Path(__file__).with_name("guard_process.py")
_START_SECONDS = 60.0
_Process = subprocess.Popen[str]


class Guard:
    """Says whether a grammar can be compiled in bounded time, memory and depth.

    The library has no such bound, cannot be interrupted, and on a chain of a few thousand
    references overflows the stack of whoever calls it. Safe to use from several threads, each of
    which gets a process.
    """

    def __init__(
        self,
        vocab_size: int,
        special: Mapping[int, str],
        eos: Sequence[int],
        limits: Mapping[str, Any],
        *,
        seconds: float,
    ) -> None:
        """For a model with these special tokens; a grammar gets ``seconds``, and ``limits`` as the
        library's ``LLParserLimits`` names them."""
        setup = {"vocab_size": vocab_size, "special": special, "eos": eos, "limits": limits}
        self._setup = json.dumps(setup)
        self._seconds = seconds
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        weakref.finalize(self, _end_all, self._idle)

    def check(self, grammar: str) -> str:
        """What is wrong with a grammar; empty if nothing is."""
        process = self._idle.pop() if self._idle else self._start()
        self._busy.add(process)
        reply = self._ask(process, json.dumps(grammar), self._seconds)
        self._busy.discard(process)
        if not reply:
            _end(process)
            return (
                f"it takes more than {self._seconds:g} seconds to compile, or more memory or "
                "nesting than there is for it"
            )
        self._idle.append(process)
        error: str = json.loads(reply)
        return error

    def _ask(self, process: _Process, line: str, seconds: float) -> str:
        """The answer of a process, which is ended if it takes too long; empty if there is none."""
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            timer.cancel()

    def _start(self) -> _Process:
        failures = []
        for interpreter in interpreters():
            try:
                return self._start_with(interpreter)
            except OSError as error:
                failures.append(f"{interpreter}: {error}")
        why = "; ".join(failures) or "there is no python3 on PATH"
        raise ExecutionError(
            f"no Python can be started to compile grammars ({why}); leave the structured output "
            "out, or run the engine where processes can be started"
        )

    def _start_with(self, interpreter: str) -> _Process:
        """A process that is ready; raises ``OSError`` where this Python makes none."""
        command = [interpreter, str(_PROGRAM), *_library()]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        if not self._ask(process, self._setup, _START_SECONDS):
            _end(process)
            raise OSError("it ended or did not answer")
        return process


def _library() -> Iterator[str]:
    """Where llguidance is, which another Python may not know."""
    found = importlib.util.find_spec("llguidance")
    for folder in (found and found.submodule_search_locations) or ():
        yield str(Path(folder).parent)


def _end_all(processes: list[_Process]) -> None:
    while processes:
        _end(processes.pop())


def _end(process: _Process) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # of what was not flushed
                pipe.close()
