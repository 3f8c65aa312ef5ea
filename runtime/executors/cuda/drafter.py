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
from slipstream.plugins.drafting.cuda import (
    DraftBuffers,
    Pages,
    Table,
    Tokens,
    advance,
    follow,
    guess,
    mask,
    move_rows,
)
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.paged_attention.cuda.attention import StepTensors
from slipstream.plugins.sampling.cuda import SamplerBuffers
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

_IN_FLIGHT = 4  # results that the host has not read, and one that is written


@dataclass(frozen=True, slots=True)
class PendingGuesses:
    """Guesses on their way to the host: the ``Guesses`` of a step whose sequences are in ``slots
    [S]``, of which ``count`` each are new; ``by_slot [slots, COLUMNS]`` are all."""

    by_slot: IntArray
    slots: IntArray
    count: int
    done: Event

    def rows(self) -> list[list[int]]:
        """Wait for them."""
        self.done.wait()
        rows: list[list[int]] = self.by_slot[self.slots, : self.count].tolist()
        return rows


@dataclass(frozen=True, slots=True)
class Read:
    """A step for the head to read; None where its layers are captured, and so are the guesses."""

    shape: Shape
    step: Step | None


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

    What was guessed of each sequence, its last token and how many drafts of the last step were
    right stay on the device. So the next step may be planned before the host knows them: what is
    unknown to it is put in before the layers (``advance``) and before rows are sampled
    (``move_rows``).
    """

    def __init__(
        self,
        part: HeadPart,
        sampler: SamplerBuffers,
        logits: Tensor,
        device: Device,
        buckets: Buckets,
        page_size: int,
    ) -> None:
        """``logits`` has room for those of the head, when a step has been sampled."""
        self.program, self._head, self._sampler = part.program, part.head, sampler
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
            tokens, sequences, rows, program.vocab_size, part.known, sampler.last_tokens
        )
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=here)
        self._starts = [starts * each for each in range(MOST)]  # made here: graphs read them
        self._slots = torch.zeros(rows, dtype=torch.int32, device=here)
        self._table = next(port.name for port in program.inputs if port.source is Source.PAGE_TABLE)
        self._hosts = [device.pinned((sequences, COLUMNS), torch.int32) for _ in range(_IN_FLIGHT)]
        self.latest: IntArray = self._hosts[-1].numpy()

    @property
    def ports(self) -> list[Port]:
        """What a step is to bring for the head."""
        return [port for port in self.program.inputs if port.source is not Source.HIDDEN]

    def advance(self, step: Step) -> None:
        """Put into a step of the target what the host did not know."""
        tables = [
            Table(each.page_table, each.slot_mapping, self._page_size)
            for each in step.attention.values()
        ]
        context = step.inputs[Source.CONTEXT_LEN.value]
        history, vocab = self._sampler.enable_full().history, self._sampler.vocab_size
        advance(_tokens(step), context, tables, history, vocab, self._buffers, step.pdl)

    def move_rows(self, rows: int, pdl: bool) -> None:
        """The same for the positions of rows that are to be sampled."""
        move_rows(self._sampler.params, rows, self._buffers, pdl)

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
            self.settle(step)
            hidden = self.program.hidden(read, memory)
            if count:
                last = self._buffers.last[: shape.sequences]
                torch.index_select(hidden, 0, last, out=self._rows[: shape.sequences])
                self._guess(read, shape.sequences, min(count, MOST), memory)

        return work

    def settle(self, step: Step) -> None:
        """Find where the sequences of a step that has been sampled have come to."""
        inputs = step.inputs
        following = inputs[NEXT_IDS], inputs[FIRST_ROWS]
        follow(_tokens(step), *following, self._sampler.tokens, self._buffers, step.pdl)

    def fetch(self, slots: IntArray, count: int) -> PendingGuesses:
        """Start copying what is guessed of all sequences to the host; ``count`` guesses of those in
        ``slots`` are new."""
        host = self._hosts[0]
        self._hosts = [*self._hosts[1:], host]
        host.copy_(self._buffers.guesses[:-1], non_blocking=True)
        done = Event(self._device)
        done.record()
        self.latest = host.numpy()
        return PendingGuesses(self.latest, slots, count, done)

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


def _tokens(step: Step) -> Tokens:
    """What a step has of tokens."""
    return Tokens(
        step.inputs[Source.TOKEN_IDS.value],
        step.inputs[Source.POSITIONS.value],
        step.inputs[Source.QUERY_START.value],
        step.token_slots,
        step.inputs[NUM_DRAFTS],
    )


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
