"""The thread that drives an engine, and an orderly end of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from slipstream.runtime.engine.loop import EngineLoop

_LOG = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds between two looks at a device that may hang
_SHUT_DOWN = "the engine was shut down; load it again to go on"


class EngineThread:
    """Runs commands and steps until it is shut down or the engine is given up.

    An engine whose device fails step after step, or hangs, or whose loop breaks, is given up:
    ``unhealthy`` and ``closed`` say why, and whoever waits for it is told. Another thread watches,
    since a device that hangs holds this one.
    """

    def __init__(
        self,
        loop: EngineLoop,
        step: Callable[[], None],
        ended: Callable[[str], None],
        step_timeout: float,
    ) -> None:
        """``step`` runs one and passes on what it changed; ``ended`` hears, from any thread, why
        nothing is taken any more."""
        self._loop = loop
        self._step = step
        self._ended = ended
        self._pause = min(_PATIENCE, step_timeout / 4)
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._closed: str | None = None
        self._broken: str | None = None  # what ended the thread
        self._prepares = True  # while there is something to prepare
        self._thread = threading.Thread(target=self._serve, name="slipstream-engine", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="slipstream-watch", daemon=True)

    @property
    def closed(self) -> str | None:
        """Why no request is taken any more; None while they are."""
        return self._closed or self._loop.forked

    @property
    def unhealthy(self) -> str | None:
        """Why the engine was given up, for good; None while it works."""
        return self._broken or self._loop.unhealthy

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._watcher.start()

    def put(self, command: Callable[[], None]) -> None:
        """Have the thread call ``command`` before its next step; from any thread."""
        self._commands.put(command)

    def check_health(self) -> bool:
        """Whether the device works; if it is to be given up, refuse new requests and say so. Safe
        from any thread."""
        reason = self.unhealthy
        if reason is not None and self._closed is None:
            _LOG.error("the engine is given up: %s", reason)
            self._close(reason)
        return reason is None

    def shutdown(self) -> None:
        """Stop the thread and free the device; one that hangs is left."""
        self._commands.put(None)
        # A device that hangs is noticed while the engine's thread waits for it.
        while self._thread.is_alive() and not self.unhealthy:
            self._thread.join(_PATIENCE)
        self._thread.join(_PATIENCE)
        self._stopped.set()

    def _serve(self) -> None:
        """Take commands, run a step, pass on what it changed."""
        try:
            while self._take_commands():
                self._step()
                if not self.check_health():
                    return
            self._close(_SHUT_DOWN)
        # The last resort: nobody may wait for ever. A panic in a Rust library is no Exception.
        except BaseException as error:  # noqa: BLE001
            _LOG.exception("the engine loop stopped")
            self._broken = f"the engine loop stopped: {error!r}. Load the engine again to go on"
            self._close(self._broken)
        finally:
            self._free()

    def _take_commands(self) -> bool:
        """Run what callers asked for, waiting if there is nothing else to do; False: stop."""
        while not (self._commands.empty() and self._loop.has_work):
            if self._commands.empty() and self._prepare():
                continue
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _prepare(self) -> bool:
        """Use the time until somebody asks; whatever fails here fails again where it matters."""
        try:
            self._prepares = self._prepares and self._loop.prepare()
        except Exception:  # noqa: BLE001 - of a device
            _LOG.warning("the device could not be prepared for more", exc_info=True)
            self._prepares = False
        return self._prepares

    def _close(self, reason: str) -> None:
        if self._closed is None:
            self._closed = reason
        self._ended(self._closed)

    def _free(self) -> None:
        try:
            self._loop.shutdown()
        except Exception:  # noqa: BLE001 - a broken device; everybody has been told
            _LOG.exception("the device could not be freed")

    def _watch(self) -> None:
        """Look after a device that may hang, from a thread that does not wait for it."""
        while not self._stopped.wait(self._pause):
            self.check_health()
