"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from slipstream.runtime.engine.kv_cache import NO_TRANSFERS, Allocation, Move, Transfers
from slipstream.runtime.engine.sequence import Sequence

# Drafts of the host in one step, of all sequences together: devices have room for their rows, and
# more would cost what they gain.
MAX_STEP_DRAFTS = 192


@dataclass(slots=True)
class StepPlan:
    """Sequences of one step and how many tokens of each: decodes first, then prefill chunks.

    Of every sequence ``counts`` tokens from ``starts`` on are computed, in the pages that were its
    ``allocations`` then; the last ``drafts`` of them are guesses, of the device or, by the place of
    the sequence, the ``guesses`` of the host. The first ``num_decodes`` sequences compute no
    prompt. ``outputs`` is the position in its output of the first token that is sampled (one after
    the last token that is no guess, and one after each that is), -1 if there is more to compute
    first.

    Where a step on its way may end in a longer run, ``starts`` and ``outputs`` count it as one
    token; the device adds the rest. ``transfers``, in their order, and then ``moves`` are made
    before anything is computed. ``ahead`` is how many tokens of each sequence the device is to
    guess after them, None where it has no head; ``offered``, where it leads, how many it has
    guessed of each decode before. ``queued``: more prompts wait than are soon computed.
    """

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    guesses: dict[int, list[int]] = field(default_factory=dict)
    num_decodes: int = 0
    allocations: list[Allocation] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    transfers: Transfers = NO_TRANSFERS
    admitted: list[Sequence] = field(default_factory=list)
    ahead: int | None = None
    offered: list[int] | None = None
    queued: bool = False

    def add(self, sequence: Sequence, count: int) -> None:
        """Compute ``count`` more tokens of ``sequence``; sample the next if that is all of them."""
        assert sequence.allocation is not None
        # As ``num_tokens`` has it, which every sequence of every step would ask.
        start, total = sequence.num_scheduled, len(sequence.tokens) + sequence.pending
        self.sequences.append(sequence)
        self.counts.append(count)
        self.starts.append(start)
        self.allocations.append(sequence.allocation)
        sequence.num_scheduled = start + count
        if start + count == total:
            sequence.pending += 1
            self.outputs.append(total - sequence.prompt_len)
        else:
            self.outputs.append(-1)

    def draft(self, count: int, guess: list[int] | None = None) -> None:
        """Verify ``count`` tokens after those of the next sequence of the plan: the ``guess``, or
        what the device guesses."""
        index = len(self.drafts)
        if guess:
            self.guesses[index] = guess
        self.counts[index] += count
        self.drafts.append(count)
        self.sequences[index].num_drafted += count
