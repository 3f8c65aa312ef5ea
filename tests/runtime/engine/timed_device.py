"""A device that computes nothing and takes, by a clock that only it moves, what a GPU would."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch, StepResult
from slipstream.runtime.executors.cuda.buckets import MIXED_TOKENS
from slipstream.runtime.request import OutputKind, Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_engine

_PAGE = 64
_TOKEN = 5  # says every row


class Clock:
    """Seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedDevice:
    """Runs ahead, as an 8B in fp8 on an H100 does: 2.9 ms and 12.5 us a token, 45 ns for each token
    that a decode attends to and 1.1 ns for each that a prompt's token does."""

    runs_ahead, draft_tokens, max_drafts = True, 0, 0
    padded_sizes = MIXED_TOKENS

    def __init__(self, clock: Clock, num_pages: int) -> None:
        self.clock = clock
        self.steps: list[tuple[int, int, float]] = []  # tokens of decodes, of prompts, and seconds
        self._num_pages = num_pages
        self._free_at = 0.0

    def reserve_kv(self, num_bytes: int | None) -> int:
        return self._num_pages

    def submit(self, batch: StepBatch) -> TimedStep:
        counts, context = np.diff(batch.query_start), batch.context_len
        prompts = counts > 1
        tokens = int(counts.sum())
        size = next((size for size in MIXED_TOKENS if size >= tokens), tokens)
        attended = counts[prompts] * (context[prompts] - counts[prompts] / 2)
        seconds = 2.9e-3 + 12.5e-6 * (size if prompts.any() else tokens)
        seconds += 44.7e-9 * float(context[~prompts].sum()) + 1.1e-9 * float(attended.sum())
        self._free_at = max(self.clock.now, self._free_at) + seconds
        self.steps.append((int((~prompts).sum()), int(counts[prompts].sum()), seconds))
        return TimedStep(self.clock, self._free_at, len(batch.sampling))

    def shutdown(self) -> None:
        pass


@dataclass
class TimedStep:
    clock: Clock
    ready: float
    rows: int

    def sample(self) -> TimedStep:
        return self

    def result(self) -> StepResult:
        self.clock.now = max(self.clock.now, self.ready)
        return StepResult([_TOKEN] * self.rows, [None] * self.rows)


@dataclass
class Load:
    """Requests on a timed device, and what those who asked have seen: seconds to first tokens and
    between tokens, those of chats apart."""

    streams: bool  # whether the loop is told that somebody waits for every token
    kind: OutputKind = "delta"
    first: dict[str, list[float]] = field(default_factory=lambda: {"stream": [], "chat": []})
    gaps: list[float] = field(default_factory=list)  # of streams
    ended: list[float] = field(default_factory=list)  # when each of them did

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.device = TimedDevice(self.clock, 4096)
        engine = counting_engine(
            page_size=_PAGE, max_batch_size=512, max_num_tokens=8192, max_seq_len=4096
        )
        engine = replace(engine, executor=self.device, vocab_size=1 << 17)
        self.loop = EngineLoop(engine, clock=self.clock, detokenizes=False, streams=self.streams)
        self._asked: dict[str, float] = {}
        self.heard: dict[str, float] = {}  # when each was heard of last

    def ask(self, prompt: Sequence[int], tokens: int, kind: str = "stream") -> None:
        name = f"{kind} {len(self._asked)}"
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self._asked[name] = self.clock.now
        self.loop.add_request(Request(name, list(prompt), params, output_kind=self.kind))

    def step(self) -> list[str]:
        """Run a step and return which streams have ended."""
        ended = []
        for state in self.loop.advance():
            name, now = state.request.request_id, self.clock.now
            kind = name.partition(" ")[0]
            if name not in self.heard:
                self.first[kind].append(now - self._asked[name])
            elif kind == "stream":
                self.gaps.append(now - self.heard[name])
            self.heard[name] = now
            if state.finished and kind == "stream":
                ended.append(name)
        return ended

    def run(
        self,
        streams: int,
        requests: int,
        lengths: tuple[int, int],
        chats: float = 0.0,
        seed: int = 0,
    ) -> float:
        """Run so many ``streams`` at a time, until all ``requests`` have ended, of prompts and
        answers of these ``lengths``; ``chats`` a second, of 2,000 tokens that begin alike, come by
        chance. Returns output tokens of streams a second."""
        rng, left, done = random.Random(seed), requests - streams, 0
        due = [rng.random() / 4 for _ in range(streams)]
        heapq.heapify(due)
        alike = rng.choices(range(1, 1 << 16), k=1980)
        chat = rng.expovariate(chats) if chats else float("inf")
        while done < requests:
            while due and due[0] <= self.clock.now:
                heapq.heappop(due)
                self.ask(rng.choices(range(1, 1 << 16), k=lengths[0]), lengths[1])
            while chat <= self.clock.now:
                self.ask([*alike, *rng.choices(range(1, 1 << 16), k=20)], 8, "chat")
                chat += rng.expovariate(chats)
            if not self.loop.has_work:
                self.clock.now = min([*due[:1], chat])
                continue
            for _ in self.step():
                done += 1
                self.ended.append(self.clock.now)
                if left:
                    left -= 1
                    heapq.heappush(due, self.clock.now + 0.003)
        return requests * lengths[1] / self.clock.now


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]
