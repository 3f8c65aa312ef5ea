"""Guesses after steps: graphs of their own, one for each shape of captured layers and number of
guesses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from slipstream.plugins.cuda.binding import Memory, Step
from slipstream.runtime.engine.step import IntArray
from slipstream.runtime.executors.cuda.buckets import Buckets, with_none
from slipstream.runtime.executors.cuda.device import Device, Work
from slipstream.runtime.executors.cuda.drafter import Drafter, PendingGuesses, Read
from slipstream.runtime.executors.cuda.inputs import Shape, StepInputs

_TIMES = 3  # that guesses are timed


class Guessing:
    """Lets a head read steps and guess after them, by a graph where the step was one."""

    def __init__(
        self,
        drafter: Drafter,
        device: Device,
        buckets: Buckets,
        inputs: StepInputs,
        step_of: Callable[[Shape], Step],
    ) -> None:
        """``step_of`` tells the step of captured layers of a shape."""
        self._drafter, self._device, self._buckets = drafter, device, buckets
        self._inputs, self._step_of = inputs, step_of
        self._memory: Memory | None = None
        self._captured: dict[tuple[Shape, int], Work] = {}

    def bind(self, memory: Memory | None) -> None:
        """Use these pages from now on; what was captured with others is dropped."""
        self._captured.clear()
        self._memory = memory

    def run(self, read: Read, count: int) -> None:
        """Let the head read the step whose layers and sampling were enqueued last, and enqueue so
        many guesses after it."""
        if read.step is not None:
            self.work(read.shape, count, read.step)()
            return
        self.capture([read.shape], [count])
        self._captured[read.shape, count]()

    def work(self, shape: Shape, count: int, step: Step | None = None) -> Work:
        """What makes ``count`` guesses after a ``step`` of a shape, or after its captured layers;
        of none, the head only reads."""
        assert self._memory is not None
        step = self._step_of(shape) if step is None else step
        return self._drafter.work(step, shape, count, self._memory)

    def works(self, shapes: Sequence[Shape], counts: Sequence[int]) -> list[Work]:
        """Steps of padding that together launch every kernel there is for so many guesses."""
        found = [(shape, count) for shape in shapes for count in with_none(counts)]
        return [self.work(*each) for each in found]

    def capture(self, shapes: Iterable[Shape], counts: Iterable[int]) -> None:
        """Capture what is not captured of so many guesses after layers of these shapes."""
        for count in counts:
            for shape in shapes:
                if (shape, count) not in self._captured:
                    work = self.work(shape, count)
                    self._captured[shape, count] = self._device.capture(work)

    def seconds(self, counts: Sequence[int]) -> dict[tuple[int, int], float]:
        """Of guesses after captured steps of decodes, by sequences and how many of each; of none,
        the head only reads."""
        with self._device.work():
            self._inputs.clear()
        return {
            (shape.sequences, count): self._device.seconds(work, _TIMES)
            for (shape, count), work in self._captured.items()
            if count in with_none(counts) and shape == self._buckets.decode(shape.sequences)
        }

    def fetch(self, slots: IntArray, count: int) -> PendingGuesses:
        """Start copying what was guessed of the sequences in ``slots`` to the host."""
        return self._drafter.fetch(slots, count)

    @property
    def latest(self) -> IntArray:
        """What is guessed of each slot before the next step, int32 ``[slots, COLUMNS]`` that the
        device may still write."""
        return self._drafter.latest
