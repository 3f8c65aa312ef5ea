"""Devices of the counting model that fail or hang."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.counting import (
    CountingExecutor,
    CountingStep,
    counting_contract,
)
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine


class Device(CountingExecutor):
    """One that fits ``engine_on``."""

    def __init__(self) -> None:
        super().__init__(64, *counting_contract(4, VOCAB_SIZE))


class BrokenDevice(Device):
    """Fails every step."""

    def submit(self, batch: StepBatch) -> CountingStep:
        self.fail_next = True
        return super().submit(batch)


class PanickingDevice(Device):
    """Breaks the loop that drives it, as a library in Rust can: by what is no ``Exception``."""

    def submit(self, batch: StepBatch) -> CountingStep:
        raise BaseException("index out of bounds")


class GatedDevice(Device):
    """Answers a step for every permit, and hangs where there is none; at the end of a ``with`` it
    answers everything. ``asked`` counts the steps whose answers were waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = threading.Semaphore(0)
        self.waiting = threading.Event()
        self.asked = 0

    def __enter__(self) -> GatedDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.permits.release(1000)

    def land(self, step: CountingStep) -> None:
        self.asked += 1
        self.waiting.set()
        self.permits.acquire()
        super().land(step)


class HeldDevice(Device):
    """Answers no step while there is a file ``gate`` in a directory, but one for every ``permit``
    that it finds there: for tests of other processes."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._directory = Path(directory)

    def land(self, step: CountingStep) -> None:
        while (self._directory / "gate").exists():
            with suppress(FileNotFoundError):
                (self._directory / "permit").unlink()
                break
            time.sleep(0.001)
        super().land(step)


class HungGPU(Device):
    """Waits for a kernel that runs for minutes."""

    def __init__(self) -> None:
        super().__init__()
        import torch

        self._cuda = torch.cuda
        self._cuda.init()

    def land(self, step: CountingStep) -> None:
        self._cuda._sleep(10**12)
        self._cuda.synchronize()


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def engine_on(device: Device, **options: Any) -> LoadedEngine:  # noqa: ANN401 - of RuntimeConfig
    """The counting model on a device."""
    return replace(counting_engine(**options), executor=device)
