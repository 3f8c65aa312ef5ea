"""Runs steps: captured graphs for steps that fit a bucket, kernel by kernel for the others."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slipstream.plugins.cuda.binding import Memory, Step
from slipstream.plugins.cuda.launch import PDL_TOKENS
from slipstream.plugins.sampling import Kind
from slipstream.plugins.sampling.cuda import normalizers
from slipstream.runtime.engine.step import IntArray, StepBatch
from slipstream.runtime.executors.cuda.buckets import QUERIES, Buckets, bucket, turn, with_none
from slipstream.runtime.executors.cuda.device import Device, Work, both
from slipstream.runtime.executors.cuda.drafter import Drafter, PendingGuesses, Read
from slipstream.runtime.executors.cuda.head import head_work
from slipstream.runtime.executors.cuda.inputs import (
    Blocks,
    Layout,
    Shape,
    StepInputs,
    num_decodes,
    query_blocks,
)
from slipstream.runtime.executors.cuda.program import CUDAProgram
from slipstream.runtime.executors.cuda.sampling import CUDASampler
from slipstream.runtime.executors.cuda.spared import HEAD_WORTH, Spared

if TYPE_CHECKING:  # engines of one rank start without it
    from slipstream.runtime.executors.cuda.team import Team

# What the first answers need is captured at the start, up to these sizes, for these kinds of
# sampling; the rest is when it is first asked for.
PREPARED_SEQUENCES = 16
PREPARED_TOKENS = 256
PREPARED_KINDS = (Kind.GREEDY, Kind.SAMPLE)
_NO_BLOCKS = Blocks(np.empty(0, np.int32), np.empty(0, np.int32))
_SINGLE = 1  # query a block
_TIMES = 3  # that a step is timed
_Key = Shape | tuple[int, Kind]  # of captured layers, or of a head


class StepRunner:
    """The model on a device, in two halves: all layers, and the head with sampling.

    Between them stand ``rows [max_rows, hidden]``, the rows whose logits are wanted; what the head
    makes of them is in ``logits [max_rows, vocab]``, but where ranks find the best token of each in
    parts. Captured steps of more than decodes leave what
    the last layer makes of every token too. Of a ``team`` of ranks the first samples, and all get
    its tokens.
    """

    def __init__(
        self,
        program: CUDAProgram,
        sampler: CUDASampler,
        device: Device,
        buckets: Buckets,
        page_columns: int,
        team: Team | None = None,
        *,
        logits: Tensor | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """A ``drafter`` guesses after steps, in the room for ``logits`` of ``max_rows`` rows."""
        self._program, self._sampler, self._device = program, sampler, device
        self._team, self._drafter = team, drafter
        self._read: Read | None = None  # the step whose layers were enqueued last
        self._guesses: dict[tuple[Shape, int], Work] = {}
        self._buckets = buckets
        self._memory: Memory | None = None
        self._layers: dict[Shape, Work] = {}
        self._heads: dict[tuple[int, Kind], Work] = {}
        self._spared = Spared()
        self._later: deque[_Key] = deque()
        count = buckets.max_rows
        with device.work():
            ports = {port.name: port for port in program.inputs}
            if drafter is not None:
                ports = {port.name: port for port in drafter.ports} | ports
            guesses = drafter is not None
            layout = Layout(ports.values(), page_columns, buckets.query_block, guesses)
            self._inputs = StepInputs(device, layout, buckets.largest)
            self.rows = torch.zeros(
                (count, program.hidden_size), dtype=program.dtype, device=device.torch
            )
            if logits is None:
                logits = torch.zeros((count, program.vocab_size), device=device.torch)
            self.logits = logits
            self._hidden = torch.zeros(
                (buckets.mixed_tokens[-1], program.hidden_size),
                dtype=program.dtype,
                device=device.torch,
            )

    @property
    def memory(self) -> Memory:
        """What ``bind`` was given."""
        assert self._memory is not None
        return self._memory

    def bind(self, memory: Memory | None) -> None:
        """Use these pages from now on; graphs that were captured with others are dropped."""
        self._layers.clear()
        self._heads.clear()
        self._guesses.clear()
        self._spared.forget()
        self._later.clear()
        self._memory = memory

    def layers(self, batch: StepBatch, rows: IntArray, *, eager: bool = False) -> Tensor:
        """Enqueue all layers, kernel by kernel if ``eager``; the wanted ``rows`` of the step are
        then in ``self.rows``.

        Returns the last layer's output of every token, valid until the next step.
        """
        tokens, decodes = len(batch.token_ids), num_decodes(batch)
        mixed = self._buckets.mixed_tokens
        if eager or tokens > mixed[-1]:
            return self._by_kernel(batch, rows, decodes)
        if tokens == len(rows):  # decodes, where some have drafts
            shape = self._served(self._decode_shape(batch, decodes))
            blocks = query_blocks(batch, 0, _SINGLE) if self._buckets.deterministic else _NO_BLOCKS
            hidden = self.rows
        else:
            shape = self._served(self._buckets.mixed(bucket(tokens, mixed), decodes))
            first = min(decodes, shape.decodes)
            blocks = query_blocks(batch, first, self._buckets.query_block)
            hidden = self._hidden
        if shape not in self._layers:  # which runs once, before the step is there
            self._inputs.pad(shape)
            self._layers[shape] = self._device.capture(self._layers_work(shape))
        self._inputs.load(batch, shape, blocks, rows)
        self._read = Read(shape, None)
        self._layers[shape]()
        return hidden[:tokens]

    def _decode_shape(self, batch: StepBatch, decodes: int) -> Shape:
        tokens, buckets = len(batch.token_ids), self._buckets
        if decodes == tokens:
            return buckets.decode(bucket(tokens, buckets.batch_sizes))
        counts = np.diff(batch.query_start)
        return buckets.verification(tokens, len(counts), int(counts.max()))

    def _served(self, wanted: Shape) -> Shape:
        """The shape of the captured layers that run a step of the ``wanted`` one."""
        if wanted in self._layers:
            return wanted
        buckets = self._buckets
        alike = [(s, buckets.rows_of(wanted, s)) for s in self._layers if buckets.alike(wanted, s)]
        return self._spared.choose(wanted, wanted.tokens, alike)

    @property
    def pools(self) -> bool:
        """Whether rows become states, none of which is sampled."""
        return self._program.pools

    def padded_rows(self, count: int) -> int:
        """For how many rows the head is captured that ``count`` rows take."""
        return bucket(count, self._buckets.row_sizes)

    def ready_head(self, padded: int, kind: Kind) -> int:
        """For how many rows ``head`` is captured that so many take; where that moves rows, it is
        now, as it runs once on padding: before the sampler is told of those of a step."""
        if self._drafter is None:
            return padded
        key = self._served_head(padded, kind)
        if key not in self._heads:
            self._sampler.clear()
            self._heads[key] = self._device.capture(self._head_work(*key))
        return key[0]

    def head(self, padded: int, kind: Kind) -> None:
        """Enqueue norm, head and sampling of the first ``padded`` rows, or of more."""
        key = self._served_head(padded, kind)
        if key not in self._heads:
            self._heads[key] = self._device.capture(self._head_work(*key))
        self._heads[key]()

    def _served_head(self, padded: int, kind: Kind) -> tuple[int, Kind]:
        if (padded, kind) in self._heads:
            return padded, kind
        alike = [(each, each[0]) for each in self._heads if each[1] is kind]
        return self._spared.choose((padded, kind), padded, alike, HEAD_WORTH)

    def guess(self, count: int) -> None:
        """Let the head read the step whose layers and sampling were enqueued last, and enqueue so
        many guesses after it."""
        assert self._read is not None
        shape, step = self._read.shape, self._read.step
        if step is not None:
            self._guess_work(shape, step, count)()
            return
        if (shape, count) not in self._guesses:
            work = self._guess_work(shape, self._step_of(shape), count)
            self._guesses[shape, count] = self._device.capture(work)
        self._guesses[shape, count]()

    def fetch_guesses(self, slots: IntArray, count: int) -> PendingGuesses:
        """Start copying what was guessed of the sequences in ``slots`` to the host."""
        assert self._drafter is not None
        return self._drafter.fetch(slots, count)

    @property
    def guessed(self) -> IntArray | None:
        """What is guessed of each slot before the next step, int32 ``[slots, COLUMNS]`` that the
        device may still write; None without a head."""
        return None if self._drafter is None else self._drafter.latest

    def guess_seconds(self, counts: Sequence[int]) -> dict[tuple[int, int], float]:
        """Of guesses after captured steps of decodes, by sequences and how many of each; of none,
        the head only reads."""
        with self._device.work():
            self._inputs.clear()
        return {
            (shape.sequences, count): self._device.seconds(work, _TIMES)
            for (shape, count), work in self._guesses.items()
            if count in with_none(counts) and shape == self._buckets.decode(shape.sequences)
        }

    def logits_of(self, hidden: Tensor, rows: IntArray) -> Tensor:
        """float32 logits ``[L, vocab]``, or states, of up to ``max_rows`` of the rows that
        ``layers`` returned, valid until the next."""
        out = self.logits[: len(rows)]
        self._program.logits(hidden[self._device.index(rows)], out)
        return out

    def works(self, counts: Sequence[int] = ()) -> list[Work]:
        """Steps of padding that together launch every kernel there is, where a head makes so many
        guesses after them."""
        with self._device.work():
            self._inputs.clear()  # operators of torch run, and steps before may have left rows
        layers = map(self._layers_work, self._shapes)
        heads = (self._head_work(size, kind) for size in self._head_sizes for kind in Kind)
        guesses = [
            self._guess_work(shape, self._step_of(shape), count)
            for shape in (self._shapes if counts else ())
            for count in with_none(counts)
        ]
        return [*layers, *heads, *guesses, self.largest_step]

    def largest_captured(self) -> list[Work]:
        """The captured work that takes the most memory, of each sort."""
        layers = [self._layers_work(shape) for shape in self._largest_shapes]
        heads = [self._head_work(size, Kind.SAMPLE) for size in self._head_sizes[-1:]]
        if self._drafter is None:
            return [*layers, *heads]
        shapes = self._largest_shapes
        return [*layers, *heads, *(self._guess_work(s, self._step_of(s), 1) for s in shapes)]

    def capture(self, counts: Sequence[int] = (), at_once: bool = True) -> None:
        """Capture the largest buckets, so that the memory of the graphs is as large as it becomes,
        then the smallest, with the usual kinds of sampling, and so many guesses after them; of the
        smallest, unless ``at_once``, a decode alone: ``capture_next`` is for all the rest."""
        small = list(filter(_prepared, self._shapes))
        times = max(QUERIES) if self._buckets.drafts else 1
        sizes = [size for size in self._head_sizes if size <= PREPARED_SEQUENCES * times]
        with self._device.work():
            self._inputs.clear()
        sizes = list(dict.fromkeys([*self._head_sizes[-1:], *sizes]))
        heads = [(size, kind) for size in sizes for kind in PREPARED_KINDS]
        largest = [*self._largest_shapes, *heads[: len(PREPARED_KINDS)]]
        first = {*largest, self._buckets.decode(1), *((1, kind) for kind in PREPARED_KINDS)}
        keys: list[_Key] = [*self._largest_shapes, *small, *heads]
        for key in dict.fromkeys(keys):
            if at_once or key in first:
                self._capture(key)
        if not at_once:
            every: list[_Key] = [*self._shapes]
            every += itertools.product(self._head_sizes, PREPARED_KINDS)
            self._later.extend(sorted((key for key in every if key not in first), key=turn))
        for count in with_none(counts):
            for shape in dict.fromkeys([*self._largest_shapes, *small]):
                work = self._guess_work(shape, self._step_of(shape), count)
                self._guesses[shape, count] = self._device.capture(work)
        self._device.synchronize()

    def capture_next(self) -> bool:
        """Capture what may be asked for next, while no step is on its way; False: all is done."""
        while self._later:
            key = self._later.popleft()
            if key in self._layers or key in self._heads:
                continue  # it was asked for
            with self._device.work():  # pages and slots have owners by now
                if isinstance(key, Shape):
                    self._inputs.pad(key)
                else:
                    self._sampler.clear()
            self._capture(key)
            self._device.synchronize()
            return True
        return False

    def _capture(self, key: _Key) -> None:
        if isinstance(key, Shape):
            self._layers[key] = self._device.capture(self._layers_work(key))
        else:
            self._heads[key] = self._device.capture(self._head_work(*key))

    def capture_decodes(self, counts: Sequence[int], most: int = 1 << 30) -> None:
        """Capture all steps of nothing but decodes, of up to ``most`` rows, with greedy sampling
        and so many guesses."""
        with self._device.work():
            self._inputs.clear()
        for size in [size for size in self._head_sizes if size <= most]:
            if (size, Kind.GREEDY) not in self._heads:
                self._capture((size, Kind.GREEDY))
        for shape in [s for s in self._shapes if not s.rows and s.tokens <= most]:
            if shape not in self._layers:
                self._layers[shape] = self._device.capture(self._layers_work(shape))
            for count in with_none(counts):
                if (shape, count) not in self._guesses:
                    work = self._guess_work(shape, self._step_of(shape), count)
                    self._guesses[shape, count] = self._device.capture(work)
        self._device.synchronize()

    def step_seconds(self) -> dict[int, float]:
        """Of steps of decodes whose layers and head have been captured, by their rows: without
        contexts, which is what they have in common."""
        with self._device.work():
            self._inputs.clear()
        found = {}
        for shape, layers in self._layers.items():
            head = self._heads.get((shape.tokens, Kind.GREEDY))
            if not shape.rows and head is not None and shape.tokens not in found:
                found[shape.tokens] = self._device.seconds(both(layers, head), _TIMES)
        return found

    def largest_step(self) -> None:
        """Enqueue the step that takes the most memory, made of padding."""
        self._inputs.clear()
        shape = self._buckets.largest
        step = self._inputs.step(shape, 0, pdl=False)
        self._program.hidden(step, self.memory, states=self._states(shape.tokens))
        self._program.logits(self.rows, self.logits)
        normalizers(self.logits)  # of which scores of prompts are made
        if self._drafter is not None:
            self._guess_work(shape, step, 1)()

    def _by_kernel(self, batch: StepBatch, rows: IntArray, decodes: int) -> Tensor:
        decodes = 0 if self._buckets.deterministic else decodes
        blocks = query_blocks(batch, decodes, self._buckets.query_block)
        tokens, sequences = len(batch.token_ids), len(batch.context_len)
        shape = Shape(tokens, sequences, len(blocks.sequence), len(rows))
        self._inputs.load(batch, shape, blocks, rows)
        step = self._inputs.step(shape, decodes, pdl=False)
        self._read = Read(shape, step)
        self._advance(step)
        hidden = self._program.hidden(step, self.memory, states=self._states(tokens))
        if len(rows):
            wanted = self._inputs.logits_rows(shape)
            torch.index_select(hidden, 0, wanted, out=self.rows[: len(rows)])
        return hidden

    @property
    def _shapes(self) -> list[Shape]:
        """Those of layers that are captured, decodes before mixed steps."""
        buckets = self._buckets
        decodes = [buckets.decode(size) for size in buckets.batch_sizes]
        return [*decodes, *buckets.verifications, *buckets.all_mixed]

    @property
    def _largest_shapes(self) -> list[Shape]:
        """The largest mixed step, the largest decode, and that with the most drafts."""
        buckets = self._buckets
        mixed, decode = buckets.mixed_tokens[-1], buckets.max_batch_size
        return [buckets.mixed(mixed), buckets.decode(decode), *buckets.verifications[-1:]]

    @property
    def _head_sizes(self) -> Sequence[int]:
        return () if self.pools else self._buckets.row_sizes

    def _layers_work(self, shape: Shape) -> Work:
        step, memory = self._step_of(shape), self.memory
        states = self._states(shape.tokens)
        wanted = self._inputs.logits_rows(shape)

        def decode() -> None:
            self._advance(step)
            self._program.hidden(step, memory, self.rows[: shape.tokens], states)

        def mixed() -> None:
            self._advance(step)
            hidden = self._program.hidden(step, memory, self._hidden[: shape.tokens], states)
            torch.index_select(hidden, 0, wanted, out=self.rows[: shape.rows])

        return mixed if shape.rows else decode

    def _advance(self, step: Step) -> None:
        if self._drafter is not None:
            self._drafter.advance(step)

    def _step_of(self, shape: Shape) -> Step:
        """The step of captured layers of a shape."""
        pdl = self._overlaps(shape.tokens)
        if shape.rows:
            return self._inputs.step(shape, shape.decodes, pdl=pdl)
        deterministic = self._buckets.deterministic
        decodes, block = (0, _SINGLE) if deterministic else (shape.sequences, None)
        return self._inputs.step(shape, decodes, pdl=pdl, query_block=block)

    def _guess_work(self, shape: Shape, step: Step, count: int) -> Work:
        assert self._drafter is not None
        return self._drafter.work(step, shape, count, self.memory)

    def _states(self, tokens: int) -> Tensor | None:
        """Where a step leaves what a head reads."""
        return None if self._drafter is None else self._drafter.states[:tokens]

    def _head_work(self, padded: int, kind: Kind) -> Work:
        rows, logits = self.rows[:padded], self.logits[:padded]
        pdl, drafter = self._overlaps(padded), self._drafter
        of = (self._program, self._sampler, self._team)
        work = head_work(*of, rows, logits, kind, pdl=pdl)
        if drafter is None or kind is Kind.GREEDY:  # which asks for no position
            return work
        return both(lambda: drafter.move_rows(padded, pdl), work)

    def _overlaps(self, tokens: int) -> bool:
        return self._device.has_pdl and tokens <= PDL_TOKENS


def _prepared(shape: Shape) -> bool:
    """Whether a step of this shape is captured at the start."""
    if shape.rows:
        return shape.tokens <= PREPARED_TOKENS and not shape.decodes
    return shape.sequences <= PREPARED_SEQUENCES and shape.tokens <= PREPARED_TOKENS
