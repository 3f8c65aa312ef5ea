"""The host's side of sampling on a GPU: packs what rows ask for and reads what came out.

A step is ``prepare``, ``launch``, ``fetch``, all enqueued on the current stream without waiting;
``PendingSample.result`` is for when the device is done. Two steps may be on their way at once.
What a sequence asks for is packed when its slot first sees it; a step then only adds positions,
anew what is forbidden where that has changed, and what forms allow, of all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.plugins import sampling
from slipstream.plugins.sampling import MAX_LOGPROBS, Field, Kind
from slipstream.plugins.sampling.cuda import SamplerBuffers, best_of_part, sample, sample_best
from slipstream.runtime.engine.step import IntArray, SamplingRow, StepResult, TokenLogprobs
from slipstream.runtime.sampling.logits_processors import completed_bad_words, ending_tokens
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import broken_row
from slipstream.runtime.structured.masks import MaskFiller

_STEPS_IN_FLIGHT = 2


@dataclass(slots=True)
class _Seen:
    """The row that a slot was packed for, what is forbidden it, and what of it is on the device.

    ``own`` is what the parameters of a row with a form allow.
    """

    row: SamplingRow
    banned: frozenset[int]
    uploaded: bool = False  # mask
    own: IntArray | None = None
    biases: torch.Tensor | None = None
    next_position: int = -1  # history is complete below it; -1: there is none


@dataclass(frozen=True, slots=True)
class _Held:
    """A row, the slot of its sequence, and the place of the bits that hold it; ``own`` is what its
    parameters allow where that is not what is kept for the slot."""

    row: SamplingRow
    slot: int
    place: int
    own: IntArray | None = None


@dataclass(frozen=True, slots=True)
class _Results:
    """Host memory that a step's results are copied into."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class PendingSample:
    """The results of one step, on their way to the host."""

    tokens: IntArray
    logprobs: IntArray

    def result(self, rows: Sequence[SamplingRow]) -> StepResult:
        """Tokens and log probabilities of ``rows``, once the device is done with the step.

        Log probabilities that ``lists_logprobs`` denies are left out. A row whose largest logit is
        not finite has failed.
        """
        token_ids = self.tokens[: len(rows)].tolist()
        result = StepResult(token_ids, [None] * len(rows))
        for i, row in enumerate(rows):
            count = row.params.logprobs
            if token_ids[i] == sampling.BROKEN:
                token_ids[i], result.failed[i] = -1, broken_row("NaN or infinite")
            elif count is not None and lists_logprobs(row.params):
                result.logprobs[i] = _token_logprobs(token_ids[i], self.logprobs[i], count)
        return result


class CUDASampler:
    """Samples on the device that has the logits (a CPU in Triton's interpreter)."""

    def __init__(
        self,
        max_rows: int,
        num_slots: int,
        vocab_size: int,
        max_seq_len: int,
        device: torch.device | str,
    ) -> None:
        """Room for ``max_rows`` rows of ``vocab_size`` logits; more than slots are for drafts."""
        self.buffers = SamplerBuffers.allocate(max_rows, num_slots, vocab_size, max_seq_len, device)
        self._pins = torch.device(device).type == "cuda"
        self._seen: list[_Seen | None] = [None] * num_slots
        self._columns = np.zeros((len(Field), num_slots), np.int32)
        self._params = [self._host(len(Field), max_rows) for _ in range(_STEPS_IN_FLIGHT)]
        self._results = [
            _Results(self._host(max_rows), self._host(max_rows, sampling.LOGPROB_COLUMNS))
            for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._filler = MaskFiller(vocab_size)
        self._max_masks = max(max_rows, num_slots)
        self._masks: list[torch.Tensor] = []  # made when a form is first asked for
        self._step = 0
        self._slots = np.zeros(0, np.int32)  # of all rows, as the device has them, if it is known

    @property
    def last_tokens(self) -> torch.Tensor:
        """The tokens sampled last, int32 [slots], on the device."""
        return self.buffers.last_tokens

    def kind(self, rows: Sequence[SamplingRow]) -> Kind:
        """Which kernels a step of ``rows`` needs."""
        return max(map(_kind, rows), default=Kind.GREEDY)

    def prepare(
        self, rows: Sequence[SamplingRow], slots: Sequence[int], padded: int, kind: Kind
    ) -> None:
        """Copy what ``rows`` ask for to the device, for a step of ``padded`` rows.

        ``slots`` are numbers of sequences, unchanged while one runs. The host must know the output
        of rows whose parameters say ``needs_output``. The first ``FULL`` step makes more buffers.
        """
        count = len(rows)
        assert count == len(slots) <= padded <= self.buffers.tokens.shape[0]
        if kind is Kind.FULL:
            self.buffers.enable_full()
        for row, slot in zip(rows, slots, strict=True):
            if not row.drafts:
                self._notice(row, slot, kind)
        self._step += 1
        host = self._params[self._step % _STEPS_IN_FLIGHT]
        block: IntArray = host.numpy()
        block[Field.SLOT] = -1
        if count:
            block[:, :count] = self._columns.take(slots, axis=1)
            block[Field.POSITION, :count] = [row.position for row in rows]
        held = [
            _Held(row, slot, slot)
            for row, slot in zip(rows, slots, strict=True)
            if row.constraint and not row.drafts
        ]
        held += self._follow_drafts(rows, slots, block)
        slots_now = block[Field.SLOT]  # of greedy rows kernels read nothing else
        if kind is not Kind.GREEDY or not np.array_equal(slots_now, self._slots):
            self.buffers.params.copy_(host, non_blocking=True)
            self._slots = slots_now.copy()
        if held:
            self._constrain(held)

    def clear(self) -> None:
        """Make all rows padding, which are not sampled."""
        self.buffers.params[Field.SLOT].fill_(-1)
        self._slots = self._slots[:0]

    def launch(self, logits: torch.Tensor, padded: int, kind: Kind, pdl: bool = False) -> None:
        """Sample the first ``padded`` rows of ``logits`` (float32 [>= padded, V]); capturable."""
        sample(logits, self.buffers, padded, kind, pdl)

    def best_of_part(self, logits: torch.Tensor, first: int, pdl: bool = False) -> torch.Tensor:
        """The best of rows of logits of the tokens from ``first`` on; capturable."""
        return best_of_part(logits, self.buffers, first, pdl)

    def launch_best(self, best: torch.Tensor, pdl: bool = False) -> None:
        """``launch`` of kind ``GREEDY`` from the best of all parts; capturable."""
        sample_best(best, self.buffers, pdl)

    def fetch(self, num_rows: int, kind: Kind) -> PendingSample:
        """Start copying the results of the step that was prepared last to the host."""
        results = self._results[self._step % _STEPS_IN_FLIGHT]
        results.tokens[:num_rows].copy_(self.buffers.tokens[:num_rows], non_blocking=True)
        full = self.buffers.full
        if kind is Kind.FULL and full is not None:
            results.logprobs[:num_rows].copy_(full.logprobs[:num_rows], non_blocking=True)
        return PendingSample(results.tokens.numpy(), results.logprobs.numpy())

    def _host(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=self._pins)

    def _device(self, values: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._pins:  # torch keeps pinned memory until the copy is done
            tensor = tensor.pin_memory()
        return tensor.to(self.buffers.tokens.device, non_blocking=True)

    def _notice(self, row: SamplingRow, slot: int, kind: Kind) -> None:
        """Bring what is kept for a slot up to date."""
        seen = self._seen[slot]
        if seen is None or not _same_sequence(seen.row, row):
            seen = self._seen[slot] = _Seen(row, _banned(row))
            self._columns[:, slot] = _pack(row, slot, seen.banned, self.buffers.vocab_size)
        elif row.params.bans_change and seen.banned != (banned := _banned(row)):
            seen.banned, seen.uploaded, seen.own = banned, False, None
            self._columns[:, slot] = _pack(row, slot, banned, self.buffers.vocab_size)
        if kind is not Kind.FULL:
            return
        if not seen.uploaded and not row.constraint:
            self._upload_mask(seen, slot)
            seen.uploaded = True
        if seen.biases is None and self._columns[Field.NUM_BIASES, slot]:
            self._upload_biases(seen, slot)
        if row.params.penalizes:
            # What the device samples, and guesses, it keeps itself: the host may be behind.
            alone = seen.next_position >= 0 and row.position > len(row.output)
            if not (alone or 0 <= row.position <= seen.next_position):
                self._upload_history(row, slot, max(seen.next_position, 0))
            # A token that is known already is not the one that the device puts there.
            seen.next_position = row.position + 1 if row.position >= len(row.output) else -1

    def _follow_drafts(
        self, rows: Sequence[SamplingRow], slots: Sequence[int], block: IntArray
    ) -> list[_Held]:
        """What holds the rows that come after drafts, each in a place of its own, where that is not
        what is kept for their slots. The parameters of such rows change, and the tokens that are
        penalized."""
        held: list[_Held] = []
        for index, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            if not row.drafts:
                continue
            seen, own = self._seen[slot], None
            assert seen is not None, "the row before its drafts comes first"
            if row.params.bans_change and (banned := _banned(row)) != seen.banned:
                block[:, index] = _pack(row, slot, banned, self.buffers.vocab_size)
                block[Field.POSITION, index] = row.position
                own = _bitmask(row.params, banned, self.buffers.vocab_size)
            if row.constraint or own is not None:
                block[Field.MASK, index] = place = len(self._seen) + len(held)
                held.append(_Held(row, slot, place, own))
            if row.params.penalizes:
                self._upload_draft(row, slot)
        return held

    def _constrain(self, held: Sequence[_Held]) -> None:
        """Upload what forms allow next, within what the parameters allow if anything is left, and
        what these allow of rows without a form."""
        if not self._masks:
            shape = (self._max_masks, self._filler.words)
            self._masks = [self._host(*shape) for _ in range(_STEPS_IN_FLIGHT)]
        host = self._masks[self._step % _STEPS_IN_FLIGHT][: len(held)]
        masks: IntArray = host.numpy()
        held = sorted(held, key=lambda each: each.row.constraint is None)
        self._filler.fill([form for each in held if (form := each.row.form)], masks)
        for mask, each in zip(masks, held, strict=True):
            own = self._own_mask(each.slot) if each.own is None else each.own
            if each.row.constraint is None:
                mask[:] = own
            elif own is not None and (both := mask & own).any():
                mask[:] = both
        places = self._device(np.array([each.place for each in held]))
        bitmask = self.buffers.enable_full().bitmask
        bitmask.index_copy_(0, places, host.to(bitmask.device, non_blocking=True))

    def _own_mask(self, slot: int) -> IntArray | None:
        seen = self._seen[slot]
        assert seen is not None
        if not seen.banned and seen.row.params.allowed_token_ids is None:
            return None
        if seen.own is None:
            seen.own = _bitmask(seen.row.params, seen.banned, self.buffers.vocab_size)
        return seen.own

    def _upload_mask(self, seen: _Seen, slot: int) -> None:
        if self._columns[Field.FLAGS, slot] & sampling.MASKED:
            mask = _bitmask(seen.row.params, seen.banned, self.buffers.vocab_size)
            self.buffers.enable_full().bitmask[slot] = self._device(mask)

    def _upload_biases(self, seen: _Seen, slot: int) -> None:
        """The kernels read them where they are kept, for as long as the slot is the sequence's."""
        bias = seen.row.params.logit_bias or {}
        packed = np.array([list(bias), [0] * len(bias)], np.int32)
        packed[1].view(np.float32)[:] = list(bias.values())
        seen.biases = self._device(packed)
        self.buffers.enable_full().biases[slot] = seen.biases.data_ptr()

    def _upload_history(self, row: SamplingRow, slot: int, known: int) -> None:
        """Upload the prompt and the output, or only what comes after the first ``known`` tokens of
        that."""
        full = self.buffers.enable_full()
        tokens = row.output[known : row.position] if known else [*row.prompt, *row.output]
        start, wanted = len(row.prompt) + known if known else 0, len(row.prompt) + row.position
        tokens = tokens[: wanted - start]
        end = start + len(tokens)
        full.history[slot, start:end] = self._device(np.array(tokens, np.int32))
        if end < wanted:  # the last token is known to the device only
            assert end == wanted - 1, (end, wanted)
            full.history[slot, end] = self.buffers.last_tokens[slot]

    def _upload_draft(self, row: SamplingRow, slot: int) -> None:
        """Put the draft before a row where the token that it may be will stand."""
        place = len(row.prompt) + row.position - 1
        self.buffers.enable_full().history[slot, place] = row.drafts[-1]


def _kind(row: SamplingRow) -> Kind:
    params = row.params
    too_short = row.position < params.min_tokens and ending_tokens(row)
    if params.edits_logits or lists_logprobs(params) or too_short:
        return Kind.FULL
    # Of greedy rows whose logits nobody reads, ranks give each other only the best.
    greedy = params.greedy and params.logprobs is None
    return Kind.GREEDY if greedy else Kind.SAMPLE


def _same_sequence(first: SamplingRow, second: SamplingRow) -> bool:
    return (
        first.output is second.output
        and first.params is second.params
        and first.seed == second.seed
        and first.prompt is second.prompt
    )


def lists_logprobs(params: SamplingParams) -> bool:
    """Whether the kernels list the log probabilities that are asked for."""
    if params.logprobs is None or params.logprob_token_ids is not None:
        return False
    return 0 <= params.logprobs <= MAX_LOGPROBS


def _pack(row: SamplingRow, slot: int, banned: frozenset[int], vocab_size: int) -> IntArray:
    """The parameters of a row in the order of ``Field``, without its position."""
    params = row.params
    column = np.zeros(len(Field), np.int32)
    floats = column.view(np.float32)
    # With every token forbidden, the likeliest of those the allow list names is taken, unedited.
    stuck = _bans_all(banned, params, vocab_size)
    seed = np.array([row.seed % 2**64], np.uint64).view(np.int32)  # low, high
    column[Field.SLOT] = column[Field.MASK] = slot
    column[Field.SEED_LOW], column[Field.SEED_HIGH] = seed
    column[Field.TOP_K] = params.top_k if 0 < params.top_k < vocab_size else 0
    column[Field.FLAGS] = _flags(params, bool(banned))
    column[Field.NUM_BIASES] = 0 if stuck else len(params.logit_bias or ())
    column[Field.PROMPT_LEN] = len(row.prompt)
    column[Field.NUM_LOGPROBS] = params.logprobs or 0
    floats[Field.TEMPERATURE] = 0 if stuck or params.greedy else params.temperature
    floats[Field.TOP_P] = params.top_p
    floats[Field.MIN_P] = params.min_p
    floats[Field.REPETITION_PENALTY] = 1 if stuck else params.repetition_penalty
    floats[Field.PRESENCE_PENALTY] = 0 if stuck else params.presence_penalty
    floats[Field.FREQUENCY_PENALTY] = 0 if stuck else params.frequency_penalty
    return column


def _flags(params: SamplingParams, bans: bool) -> int:
    masked = bans or params.allowed_token_ids is not None or params.structured is not None
    return (
        sampling.MASKED * masked
        | sampling.PENALIZES * params.penalizes
        | sampling.LOGPROBS * lists_logprobs(params)
    )


def _banned(row: SamplingRow) -> frozenset[int]:
    """What may not come next: ends of bad words, and of an output that is still too short."""
    output = [*row.output, *row.drafts] if row.drafts else row.output
    banned = completed_bad_words(row.params, output)
    if row.position < row.params.min_tokens:
        banned += ending_tokens(row)
    return frozenset(banned)


def _bans_all(banned: frozenset[int], params: SamplingParams, vocab_size: int) -> bool:
    if params.allowed_token_ids is None:
        return len(banned) == vocab_size
    return banned.issuperset(params.allowed_token_ids)


def _bitmask(params: SamplingParams, banned: frozenset[int], vocab_size: int) -> IntArray:
    """The allowed tokens of a row as int32 words; the allow list alone if all of it is banned."""
    mask = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    allowed = params.allowed_token_ids
    mask[slice(vocab_size) if allowed is None else list(allowed)] = True
    permitted = mask.copy()
    permitted[list(banned)] = False
    words: IntArray = np.packbits(permitted if permitted.any() else mask, bitorder="little").view(
        np.int32
    )
    return words


def _token_logprobs(token: int, columns: IntArray, count: int) -> TokenLogprobs:
    values = columns.view(np.float32)
    ids = columns[sampling.TOP_IDS_COLUMN : sampling.TOP_IDS_COLUMN + count].tolist()
    found = values[sampling.TOP_VALUES_COLUMN : sampling.TOP_VALUES_COLUMN + count].tolist()
    top = {
        i: (value, rank)
        for rank, (i, value) in enumerate(zip(ids, found, strict=True), 1)
        if i >= 0
    }
    own = float(values[sampling.LOGPROB_COLUMN])
    return TokenLogprobs(token, own, int(columns[sampling.RANK_COLUMN]), top)
