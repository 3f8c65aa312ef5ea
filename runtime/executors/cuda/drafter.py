"""Guesses of a head on the device, right after a step: from its states and what it sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.builder.contract import DRAFTS, HEAD_GRAPH, HIDDEN, Head, Port, Source
from slipstream.builder.engine import Manifest
from slipstream.plugins.cuda.binding import Memory, Step
from slipstream.plugins.cuda.launch import PDL_TOKENS
from slipstream.plugins.drafting import COLUMNS, MOST
from slipstream.plugins.drafting.cuda import DraftBuffers, Pages, follow, guess, mask
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.paged_attention.cuda.attention import StepTensors
from slipstream.runtime.engine.step import IntArray
from slipstream.runtime.executors.cuda.buckets import QUERIES, Buckets, bucket
from slipstream.runtime.executors.cuda.device import Device, Event, Work
from slipstream.runtime.executors.cuda.inputs import (
    CAPACITY,
    FIRST_ROWS,
    NEXT_IDS,
    NUM_DRAFTS,
    Shape,
)
from slipstream.runtime.executors.cuda.program import CUDAProgram

_IN_FLIGHT = 3  # results that the host has not read, and one that is written


@dataclass(frozen=True, slots=True)
class PendingGuesses:
    """Guesses on their way to the host: the ``Guesses`` of a step."""

    array: IntArray
    done: Event

    def rows(self) -> list[list[int]]:
        """Wait for them."""
        self.done.wait()
        rows: list[list[int]] = self.array.tolist()
        return rows


@dataclass(frozen=True, slots=True)
class HeadPart:
    """A head as an executor has it: what it is, its program, and the target's token for each of its
    own, None where those are the same."""

    head: Head
    program: CUDAProgram
    known: Tensor | None


class Drafter:
    """Runs a head after a step, on the tokens of that step and then on its own guesses.

    Every step is read, so that the head knows all that the target does: at a token's place it reads
    the token after it, beside what ``states [T, width]`` has of the one before. Up to ``MOST``
    guesses follow the last token of each sequence that counts, without the host: one by one where a
    head is ``eagle3``, else the others at once. They end with the pages of a sequence.
    """

    def __init__(
        self,
        part: HeadPart,
        sampled: Tensor,
        logits: Tensor,
        device: Device,
        buckets: Buckets,
        page_size: int,
    ) -> None:
        """``sampled`` are the tokens of a step's rows; ``logits`` has room for those of the
        head, when a step has been sampled."""
        self.program, self._head, self._sampled = part.program, part.head, sampled
        self._device, self._page_size = device, page_size
        program, sequences, rows = part.program, buckets.max_batch_size, buckets.max_rows
        tokens, here = buckets.largest.tokens, device.torch
        port = next(port for port in program.inputs if port.source is Source.HIDDEN)
        width = int(port.shape[1])

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=program.dtype, device=here)

        self.states = new(tokens, width)
        self._unknown = new(rows, width)
        self._rows = new(rows, program.hidden_size)
        self._logits = logits.view(-1)
        self._buffers = DraftBuffers.allocate(
            tokens, sequences, rows, program.vocab_size, part.known, here
        )
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=here)
        self._starts = [starts * each for each in range(MOST)]  # made here: graphs read them
        self._slots = torch.zeros(rows, dtype=torch.int32, device=here)
        self._table = next(port.name for port in program.inputs if port.source is Source.PAGE_TABLE)
        self._hosts = [device.pinned((sequences, COLUMNS), torch.int32) for _ in range(_IN_FLIGHT)]

    @property
    def ports(self) -> list[Port]:
        """What a step is to bring for the head."""
        return [port for port in self.program.inputs if port.source is not Source.HIDDEN]

    def work(self, step: Step, shape: Shape, count: int, memory: Memory) -> Work:
        """What reads a ``step`` of the target, whose states are in place, and makes ``count``
        guesses."""
        read = replace(
            step,
            inputs={
                **step.inputs,
                Source.TOKEN_IDS.value: self._buffers.following[: shape.tokens],
                HIDDEN: self.states[: shape.tokens],
            },
        )

        def work() -> None:
            self._follow(step.inputs, shape, step.pdl)
            hidden = self.program.hidden(read, memory)
            if count:
                last = self._buffers.last[: shape.sequences]
                torch.index_select(hidden, 0, last, out=self._rows[: shape.sequences])
                self._guess(read, shape.sequences, min(count, MOST), memory)

        return work

    def fetch(self, sequences: int, count: int) -> PendingGuesses:
        """Start copying ``count`` guesses of each sequence to the host."""
        host = self._hosts[0]
        self._hosts = [*self._hosts[1:], host]
        host[:sequences].copy_(self._buffers.guesses[:sequences], non_blocking=True)
        done = Event(self._device)
        done.record()
        return PendingGuesses(host.numpy()[:sequences, :count], done)

    def _follow(self, inputs: Mapping[str, Tensor], shape: Shape, pdl: bool) -> None:
        follow(
            inputs[Source.TOKEN_IDS.value],
            inputs[Source.POSITIONS.value],
            inputs[Source.QUERY_START.value],
            inputs[NEXT_IDS],
            inputs[FIRST_ROWS],
            inputs[NUM_DRAFTS],
            self._sampled,
            self._buffers,
            pdl,
        )

    def _guess(self, read: Step, sequences: int, count: int, memory: Memory) -> None:
        """``count`` guesses after the rows of the head's last layer."""
        pages = Pages(
            read.attention[self._table].page_table, read.inputs[CAPACITY], self._page_size
        )
        pdl = self._device.has_pdl and sequences <= PDL_TOKENS
        one_by_one = self._head.mask_token is None
        hidden, logits = self._say(sequences, pdl)
        guess(logits, self._buffers, pages, 0, 1, one_by_one and count > 1, pdl)
        if one_by_one:
            for column in range(1, count):
                step = self._step(read, sequences, 1, hidden, pdl)
                self.program.hidden(step, memory, out=self._rows[:sequences])
                hidden, logits = self._say(sequences, pdl)
                guess(logits, self._buffers, pages, column, 1, column < count - 1, pdl)
        elif each := min(count - 1, len(self._rows) // sequences):
            self._guess_masked(read, sequences, each, pages, memory)

    def _guess_masked(
        self, read: Step, sequences: int, each: int, pages: Pages, memory: Memory
    ) -> None:
        """``each`` guesses of every sequence at once, after the first."""
        rows = sequences * each
        pdl = self._device.has_pdl and rows <= PDL_TOKENS
        assert self._head.mask_token is not None
        mask(self._head.mask_token, sequences, each, self._buffers, pages, pdl)
        step = self._step(read, sequences, each, self._unknown[:rows], pdl)
        self.program.hidden(step, memory, out=self._rows[:rows])
        _, logits = self._say(rows, pdl)
        guess(logits, self._buffers, pages, 1, each, False, pdl)

    def _say(self, rows: int, pdl: bool) -> tuple[Tensor, Tensor]:
        """What the head takes with the next token, and its logits, of its first rows."""
        size = self.program.vocab_size
        logits = self._logits[: rows * size].view(rows, size)
        return self.program.logits(self._rows[:rows], logits, pdl), logits

    def _step(self, read: Step, sequences: int, each: int, hidden: Tensor, pdl: bool) -> Step:
        """A run of the head on ``each`` places of every sequence."""
        b, rows, given = self._buffers, sequences * each, read.attention[self._table]
        attention = StepTensors(
            query_start=self._starts[each][: sequences + 1],
            context_len=b.context_len[:sequences],
            page_table=given.page_table,
            slot_mapping=b.slots[:rows],
            block_sequence=given.block_sequence[:0],
            block_start=given.block_start[:0],
            num_decodes=sequences,
            query_block=given.query_block,
            queries=bucket(each, (1, *QUERIES)),
        )
        inputs = {
            Source.TOKEN_IDS.value: b.ids[:rows],
            Source.POSITIONS.value: b.positions[:rows],
            HIDDEN: hidden,
        }
        return Step(inputs, self._slots[:rows], {self._table: attention}, pdl)


def head_part(
    manifest: Manifest,
    graph: ir.Graph,
    weights: Mapping[str, Tensor],
    tactics: Tactics,
    device: Device,
) -> HeadPart:
    """The head of an engine, on the device."""
    assert manifest.head is not None
    program = CUDAProgram(graph, manifest.graphs[HEAD_GRAPH], weights, tactics, device.torch, {})
    drafts = next(value for value in graph.outputs if value.name == DRAFTS).producer()
    known = None
    if drafts is not None and drafts.op_type == "Gather":
        table = drafts.inputs[0]
        assert table is not None and table.const_value is not None
        known = torch.from_numpy(table.const_value.numpy().copy()).to(device.torch)
    return HeadPart(manifest.head, program, known)
