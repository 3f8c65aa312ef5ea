"""The CUDA PagedAttention kernels against the NumPy reference."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.plugins.interpreter import sums_in_float64

from slipstream.plugins.cuda.launch import has_pdl
from slipstream.plugins.paged_attention import reference
from slipstream.plugins.paged_attention.cuda import attention as cuda
from slipstream.plugins.paged_attention.cuda.attention import (
    DecodeWorkspace,
    StepTensors,
    paged_attention,
    query_block,
)
from slipstream.plugins.paged_attention.reference import Attributes, Inputs

pytestmark = pytest.mark.kernel

PAGE = 64
TYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
Sequence = tuple[int, int]  # (query tokens, tokens in the cache after the step); (1, 0): padding


@dataclass(frozen=True)
class Case:
    """A step whose first ``decodes`` sequences have one query, or all up to ``queries``;
    ``padding`` adds rows to it. If ``may_be``, it was captured for so many decodes."""

    batch: tuple[Sequence, ...]
    decodes: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float16"
    pages: str = ""  # the dtype of the step if empty
    rotary: int = -1  # half the rotated width; -1: the whole head
    window: int = 0
    soft_cap: float = 0.0
    norm: bool = False
    sinks: bool = False
    padding: int = 0
    kv_parts: int = 2
    v_norm: int = 0
    query_block: int = 0  # that of the step; 0: of the layer
    queries: int = 1
    may_be: int = 0

    def attributes(self) -> Attributes:
        return Attributes(
            layer=1,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            page_size=PAGE,
            scale=self.head_dim**-0.5,
            sliding_window=self.window,
            soft_cap=self.soft_cap,
            norm_eps=1e-5,
            kv_parts=self.kv_parts,
            v_norm=self.v_norm,
            k_row_major=1,
            k_scale=0.03,
            v_scale=0.02,
        )

    def inputs(self, seed: int = 0) -> Inputs:
        """Random sequences in shuffled pages, rounded to the dtypes; unwritten slots are NaN."""
        rng = np.random.default_rng(seed)
        tokens = sum(n for n, _ in self.batch)
        half = self.head_dim // 2 if self.rotary < 0 else self.rotary
        angles = rng.uniform(0, 6.3, (tokens, half))
        table, slots, num_pages = self._pages(rng)
        width = (self.heads + self.kv_parts * self.kv_heads) * self.head_dim
        shape = (2, num_pages, 2, self.kv_heads, PAGE * self.head_dim)
        weights = rng.normal(1, 0.2, (2, self.head_dim)).astype(np.float32)
        inputs = Inputs(
            qkv=self._rounded(rng.normal(0, 1.5, (tokens, width))),
            cos=np.cos(angles).astype(np.float32),
            sin=np.sin(angles).astype(np.float32),
            kv_cache=np.full(shape, np.nan, TYPES[self.pages or self.dtype]),
            query_start=np.cumsum([0, *(n for n, _ in self.batch)], dtype=np.int32),
            context_len=np.array([context for _, context in self.batch], np.int32),
            page_table=table,
            slot_mapping=slots,
            q_norm=self._rounded(weights[0]) if self.norm else None,
            k_norm=self._rounded(weights[1]) if self.norm and self.kv_parts else None,
            sinks=rng.normal(1, 1, self.heads).astype(np.float32) if self.sinks else None,
        )
        attributes = self.attributes()
        for s, (n, context) in enumerate(self.batch):
            stored = context - n if self.kv_parts else context
            for slot in self._slots(table[s], np.arange(stored)):
                for which in (0, 1):
                    heads = rng.normal(0, 1, (self.kv_heads, self.head_dim))
                    reference.write_page(inputs, attributes, which, int(slot), heads)
        return inputs

    def _rounded(self, x: NDArray[Any]) -> NDArray[np.float32]:
        return x.astype(TYPES[self.dtype]).astype(np.float32)

    def _pages(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], int]:
        needed = [-(-context // PAGE) for _, context in self.batch]
        num_pages = sum(needed) + 2
        free = rng.permutation(num_pages).astype(np.int32)
        table = np.full((len(self.batch), max(needed) + 1), num_pages - 1, np.int32)
        slots: list[int] = []
        for s, (n, context) in enumerate(self.batch):
            table[s, : needed[s]], free = free[: needed[s]], free[needed[s] :]
            slots += self._slots(table[s], np.arange(context - n, context)).tolist()
        return table, np.array(slots, np.int32), num_pages

    def _slots(self, pages: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(pages[positions // PAGE] * PAGE + positions % PAGE)

    def step(self, inputs: Inputs, device: str) -> StepTensors:
        """The step on the device, with ``padding`` more sequences, tokens and blocks."""
        block = self.query_block or query_block(self.attributes())
        blocks = [
            (s, start)
            for s, (n, _) in enumerate(self.batch)
            if s >= self.decodes
            for start in range(0, n, block)
        ]
        blocks += [(-1, 0)] * self.padding
        decodes = self.decodes + (self.padding if self.decodes == len(self.batch) else 0)
        decodes = max(decodes, self.may_be)
        others = len(self.batch) + self.padding - self.decodes
        spare = (0, self.padding)

        def tensor(values: NDArray[np.int32] | list[int]) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, np.int32)).to(device)

        wide = np.pad(inputs.page_table, ((0, self.padding), (0, 3)), constant_values=1 << 20)
        return StepTensors(
            query_start=tensor(np.pad(inputs.query_start, spare, mode="edge")),
            context_len=tensor(np.pad(inputs.context_len, spare)),
            page_table=tensor(wide)[:, :-3],
            slot_mapping=tensor(np.pad(inputs.slot_mapping, spare, constant_values=-1)),
            block_sequence=tensor([s for s, _ in blocks]),
            block_start=tensor([start for _, start in blocks]),
            num_decodes=decodes,
            query_block=block,
            queries=self.queries,
            decode_len=tensor(np.pad(inputs.context_len[: self.decodes], (0, others)))
            if self.may_be
            else None,
        )


def to_torch(array: NDArray[Any], dtype: str, device: str) -> torch.Tensor:
    """The values of an array as a tensor of another dtype."""
    bits = array.astype(TYPES[dtype])
    raw = torch.from_numpy(bits.view(f"i{bits.itemsize}").copy())
    return raw.view(getattr(torch, dtype)).to(device)


def run(
    case: Case,
    inputs: Inputs,
    device: str,
    *,
    pdl: bool = False,
    early: bool = False,
    plans: dict[tuple[int, ...], torch.Tensor] | None = None,
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """The kernels' output ``[T, heads * head_dim]``, and the pages they wrote."""
    pages = to_torch(inputs.kv_cache, case.pages or case.dtype, device)
    rows = ((0, case.padding), (0, 0))
    weights = [
        None if w is None else to_torch(w, case.dtype, device)
        for w in (inputs.q_norm, inputs.k_norm)
    ]
    step = case.step(inputs, device)
    shape = (len(step.slot_mapping), case.heads, case.head_dim)
    workspace = DecodeWorkspace.allocate(*shape, 4096, device)
    workspace.partials.fill_(torch.nan)
    workspace.statistics.fill_(torch.nan)
    output = paged_attention(
        to_torch(np.pad(inputs.qkv, rows), case.dtype, device),
        torch.from_numpy(np.pad(inputs.cos, rows)).to(device),
        torch.from_numpy(np.pad(inputs.sin, rows)).to(device),
        pages,
        step,
        case.attributes(),
        q_norm=weights[0],
        k_norm=weights[1],
        sinks=None if inputs.sinks is None else torch.from_numpy(inputs.sinks).to(device),
        workspace=workspace,
        pdl=pdl,
        early=early,
        plans=plans,
    )
    assert not workspace.arrivals.any()
    bits = pages.view(torch.int8).cpu().numpy().view(TYPES[case.pages or case.dtype])
    return output[: len(inputs.qkv)].float().cpu().numpy(), bits.reshape(inputs.kv_cache.shape)


def check_pages(got: NDArray[Any], want: NDArray[Any]) -> None:
    """Equal but for one unit in the last place where float32 and float64 fall on two sides of a
    tie; what nobody wrote is untouched."""
    unwritten = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), unwritten)
    bits = [x[~unwritten].view(f"i{x.dtype.itemsize}").astype(np.int64) for x in (got, want)]
    assert np.abs(bits[0] - bits[1]).max() <= 1
    assert (bits[0] != bits[1]).mean() < 1e-3


DECODES = ((1, 1), (1, 33), (1, 64), (1, 65), (1, 200))
PREFILLS = ((3, 64), (17, 81))
DRAFTS = ((4, 4), (3, 66), (1, 64), (4, 200), (2, 130))
CASES = {
    "decode": Case(DECODES, 5),
    "decode_groups_of_3": Case(((1, 130), (1, 70)), 2, heads=9, kv_heads=3, head_dim=64),
    "decode_groups_of_8": Case(((1, 130), (1, 63)), 2, heads=8, kv_heads=1, head_dim=64),
    "decode_no_groups": Case(((1, 130),), 1, heads=3, kv_heads=3, head_dim=16),
    "decode_20_rows": Case(((1, 130),), 1, heads=20, kv_heads=1, head_dim=24),
    "decode_llama": Case(((1, 300), (1, 64)), 2, heads=8, kv_heads=2, head_dim=128),
    "decode_bfloat16": Case(DECODES[1:4], 3, dtype="bfloat16", norm=True),
    "decode_float8": Case(DECODES, 5, pages="float8_e4m3fn"),
    "decode_partial_rotary": Case(DECODES[:2], 2, head_dim=80, rotary=16, norm=True),
    "decode_no_rotary": Case(((1, 70),), 1, head_dim=24, rotary=0),
    "decode_window": Case(DECODES, 5, window=70),
    "decode_window_of_one": Case(DECODES[2:], 3, window=1),
    "decode_soft_cap": Case(DECODES[3:], 2, soft_cap=3.0),
    "decode_sinks": Case(DECODES[3:], 2, sinks=True),
    "decode_padding": Case(DECODES[:2], 2, padding=2),
    # Splits of two pages, the last one half full.
    "decode_long": Case(((1, 64 * 40 + 9),), 1, heads=2, kv_heads=1, head_dim=16, sinks=True),
    # Drafts after a token: at the beginning of a sequence, over the end of a page, in a page.
    "drafts": Case(((4, 4), (3, 66), (1, 64)), 3, queries=4, norm=True, padding=1),
    "drafts_of_every_number": Case(((8, 130), (5, 69)), 2, 3, 1, 24, "bfloat16", queries=8),
    "drafts_window": Case(((4, 200), (4, 66)), 2, queries=4, window=64, pages="float8_e4m3fn"),
    "drafts_long": Case(
        ((4, 64 * 40 + 9),), 1, 2, 1, 16, queries=4, sinks=True, soft_cap=5.0, kv_parts=0
    ),
    "prefill": Case(((3, 64), (68, 68), (17, 81)), 0),  # the second one is two blocks
    "prefill_groups_of_3": Case(((45, 130),), 0, heads=3, kv_heads=1, head_dim=64),
    "prefill_no_groups": Case(((50, 200),), 0, heads=3, kv_heads=3, head_dim=24),
    "prefill_llama": Case(((40, 200),), 0, heads=8, kv_heads=2, head_dim=128),
    "prefill_bfloat16": Case(PREFILLS, 0, dtype="bfloat16", norm=True),
    "prefill_float8": Case(PREFILLS, 0, pages="float8_e4m3fn"),
    "prefill_partial_rotary": Case(PREFILLS, 0, head_dim=80, rotary=16, norm=True),
    "prefill_window": Case(PREFILLS, 0, window=40),
    "prefill_window_of_tiles": Case(((40, 400),), 0, kv_heads=1, window=200),
    "prefill_soft_cap": Case(PREFILLS, 0, soft_cap=3.0),
    "prefill_sinks": Case(PREFILLS, 0, sinks=True),
    "prefill_padding": Case(PREFILLS, 0, padding=3),
    "mixed": Case((*DECODES[1:3], *PREFILLS), 2, padding=2),
    # Captured for more decodes than there are: the prompts, and padding, are among them.
    "mixed_of_any_decodes": Case((*DECODES[1:3], *PREFILLS), 2, padding=2, norm=True, may_be=5),
    "mixed_of_no_decodes": Case(PREFILLS, 0, padding=1, pages="float8_e4m3fn", may_be=2),
    "mixed_in_blocks": Case((*DECODES[1:4], *PREFILLS), 0, padding=2),
    "decode_keys_are_values": Case(DECODES[1:3], 2, kv_parts=1, v_norm=1, norm=True),
    "decode_v_norm": Case(DECODES[1:3], 2, v_norm=1, head_dim=24),
    "decode_keys_of_another": Case(DECODES[3:], 2, kv_parts=0, norm=True, window=70),
    "decode_heads_of_512": Case(
        DECODES[3:], 2, heads=2, kv_heads=1, head_dim=512, rotary=64, norm=True
    ),
    "prefill_keys_are_values": Case(PREFILLS, 0, kv_parts=1, v_norm=1, norm=True),
    "prefill_v_norm": Case(PREFILLS, 0, v_norm=1, head_dim=24),
    "prefill_keys_of_another": Case(PREFILLS, 0, kv_parts=0, norm=True, window=40),
    "prefill_heads_of_512": Case(
        ((3, 64), (40, 104)), 0, heads=2, kv_heads=1, head_dim=512, rotary=64, norm=True
    ),
    # Blocks of 20 queries, of which this layer takes three at once.
    "prefill_in_blocks_of_another_layer": Case(((68, 68), (17, 81)), 0, query_block=20),
    "everything": Case(
        ((1, 90), (1, 213), (60, 300)),
        2,
        head_dim=24,
        window=50,
        soft_cap=5.0,
        norm=True,
        sinks=True,
    ),
}
# Layers that a kernel for Hopper knows, in every shape of it; Gluon has no interpreter. With drafts
# others too, which are slow in Triton's.
HOPPER = {
    "decode_llama_float8": Case(
        (*DECODES, (1, 300)), 6, heads=8, head_dim=128, dtype="bfloat16", pages="float8_e4m3fn"
    ),
    "decode_llama_float8_under_float16": Case(
        (*DECODES, (1, 2309)), 6, heads=8, head_dim=128, pages="float8_e4m3fn", norm=True
    ),
    "decode_heads_of_64_float8": Case(
        DECODES, 5, heads=20, kv_heads=1, head_dim=64, pages="float8_e4m3fn", sinks=True
    ),
    "decode_llama_everything": Case(
        ((1, 1), (1, 129), (1, 2309)),
        3,
        heads=8,
        head_dim=128,
        dtype="bfloat16",
        norm=True,
        sinks=True,
        rotary=16,
        padding=2,
    ),
    "decode_heads_of_64": Case(DECODES, 5, heads=20, kv_heads=1, head_dim=64),
    "decode_heads_of_256": Case(((1, 129), (1, 64)), 2, heads=2, kv_heads=1, head_dim=256),
    "decode_heads_of_256_float8": Case(
        ((1, 129), (1, 64)), 2, kv_heads=1, head_dim=256, pages="float8_e4m3fn"
    ),
    "drafts_llama": Case(DRAFTS, 5, queries=4, heads=8, head_dim=128, dtype="bfloat16", norm=True),
    "drafts_llama_of_every_number": Case(
        ((8, 8), (5, 69), (1, 65), (8, 2309)),
        4,
        queries=8,
        heads=8,
        head_dim=128,
        dtype="bfloat16",
        pages="float8_e4m3fn",
        padding=2,
    ),
    "drafts_heads_of_64": Case(DRAFTS, 5, queries=4, heads=20, kv_heads=4, head_dim=64, sinks=True),
    "drafts_heads_of_256": Case(DRAFTS, 5, queries=4, heads=4, kv_heads=1, head_dim=256),
    "drafts_llama_keys_of_another": Case(DRAFTS, 5, queries=4, head_dim=128, kv_parts=0),
    "drafts_window_of_one": Case(DRAFTS, 5, queries=4, window=1),
    "drafts_keys_are_values": Case(DRAFTS, 5, queries=4, kv_parts=1, v_norm=1, norm=True, rotary=4),
    "decode_llama_keys_of_another": Case(DECODES[3:], 2, head_dim=128, kv_parts=0),
}
# What the prefill kernel for Hopper takes where there is one: blocks of every size, behind what
# was there before and on their own, with pages of whole and of part tiles.
CHUNKS = ((1, 6), (31, 331), (200, 277), (64, 1064), (100, 100), (5, 5), (129, 193))
HOPPER_PREFILLS = {
    "llama": Case(CHUNKS, 0, heads=8, kv_heads=2, head_dim=128, dtype="bfloat16", padding=3),
    "float16": Case(CHUNKS, 0, heads=8, kv_heads=2, head_dim=128),
    "float8": Case(
        CHUNKS, 0, heads=8, kv_heads=2, head_dim=128, dtype="bfloat16", pages="float8_e4m3fn"
    ),
    "float8_heads_of_64": Case(CHUNKS, 0, head_dim=64, pages="float8_e4m3fn", sinks=True),
    "float8_under_float16": Case(
        CHUNKS, 0, heads=8, kv_heads=2, head_dim=128, pages="float8_e4m3fn", norm=True
    ),
    "sinks_and_norms": Case(CHUNKS, 0, head_dim=64, dtype="bfloat16", sinks=True, norm=True),
    "groups_of_7": Case(CHUNKS, 0, heads=14, kv_heads=2, head_dim=128, dtype="bfloat16"),
    "groups_of_20": Case(CHUNKS, 0, heads=20, kv_heads=1, head_dim=64, sinks=True),
    "no_groups": Case(CHUNKS, 0, heads=3, kv_heads=3, head_dim=128),
    "heads_of_256": Case(CHUNKS, 0, kv_heads=1, head_dim=256, dtype="bfloat16", rotary=16),
    "keys_are_values": Case(CHUNKS, 0, head_dim=256, kv_parts=1, v_norm=1, norm=True),
    "keys_of_another": Case(CHUNKS, 0, head_dim=128, kv_parts=0, norm=True),
    "in_blocks_of_another_layer": Case(CHUNKS, 0, head_dim=64, query_block=20),
    "behind_decodes": Case(((1, 33), (1, 200), *CHUNKS), 2, head_dim=128, dtype="bfloat16"),
    "behind_any_decodes": Case(
        ((1, 33), (1, 200), *CHUNKS), 2, head_dim=128, dtype="bfloat16", padding=3, may_be=8
    ),
    "behind_any_decodes_float8": Case(
        ((1, 33), (1, 2200), *CHUNKS), 2, head_dim=128, pages="float8_e4m3fn", may_be=4, norm=True
    ),
}
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.gpu) for name in HOPPER)]
)
def test_matches_the_reference(name: str, device: str) -> None:
    check((CASES | HOPPER)[name], device)


def check(case: Case, device: str) -> None:
    """Pages and output against the reference."""
    inputs = case.inputs()
    output, pages = run(case, deepcopy(inputs), device)
    queries = reference.write_pages(inputs, case.attributes())
    check_pages(pages, inputs.kv_cache)
    want = reference.attend_pages(replace(inputs, kv_cache=pages), case.attributes(), queries)
    tolerance = TOLERANCE[case.dtype] * float(np.abs(want).max())
    np.testing.assert_allclose(output, want, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*HOPPER, "decode_llama", "prefill_llama"])
def test_matches_the_reference_without_the_kernels_for_hopper(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_suits_hopper_decode", lambda *_: False)
    monkeypatch.setattr(cuda, "_suits_hopper_prefill", lambda *_: False)
    test_matches_the_reference(name, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOPPER_PREFILLS)
def test_prefills_match_the_reference_with_and_without_the_kernel_for_hopper(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(HOPPER_PREFILLS[name], device)
    monkeypatch.setattr(cuda, "_suits_hopper_prefill", lambda *_: False)
    check(HOPPER_PREFILLS[name], device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "float8"])
@pytest.mark.parametrize("programs", [1, 3, 50])
def test_a_prefill_is_bit_equal_for_any_number_of_programs(
    programs: int, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = HOPPER_PREFILLS[name]
    output, _ = run(case, case.inputs(), device)
    monkeypatch.setattr(cuda, "multiprocessors", lambda _: programs)
    np.testing.assert_array_equal(run(case, case.inputs(), device)[0], output)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "float8"])
def test_a_prefill_is_bit_equal_whatever_else_is_in_the_step(name: str, device: str) -> None:
    case = HOPPER_PREFILLS[name]
    inputs = case.inputs()
    together, _ = run(case, deepcopy(inputs), device)
    for s in range(len(CHUNKS)):
        rows = slice(*inputs.query_start[s : s + 2])
        cut = {name: getattr(inputs, name)[rows] for name in ("qkv", "cos", "sin", "slot_mapping")}
        of_sequence = {
            name: getattr(inputs, name)[s : s + 1] for name in ("context_len", "page_table")
        }
        one = replace(
            deepcopy(inputs),
            **cut,
            **of_sequence,
            query_start=np.array([0, CHUNKS[s][0]], np.int32),
        )
        output, _ = run(replace(case, batch=CHUNKS[s : s + 1]), one, device)
        np.testing.assert_array_equal(output, together[rows])


def test_what_no_window_reaches_is_not_read(device: str) -> None:
    """Such pages may be another sequence's by now."""
    case = Case(((1, 300), (20, 310)), 1, kv_heads=1, window=40)
    inputs = case.inputs()
    output, _ = run(case, deepcopy(inputs), device)
    for s, (n, context) in enumerate(case.batch):
        behind = inputs.page_table[s, : (context - n + 1 - case.window) // PAGE]
        inputs.kv_cache[:, behind] = np.nan
    np.testing.assert_array_equal(run(case, inputs, device)[0], output)


def alone(inputs: Inputs, sequence: int) -> Inputs:
    """The step of one of the decodes."""
    names = ("qkv", "cos", "sin", "slot_mapping", "context_len", "page_table")
    cut = {name: getattr(inputs, name)[sequence : sequence + 1] for name in names}
    return replace(deepcopy(inputs), **cut, query_start=np.array([0, 1], np.int32))


@pytest.mark.parametrize(
    ("head_dim", "pages"),
    [
        (16, ""),
        pytest.param(128, "", marks=pytest.mark.gpu),
        pytest.param(128, "float8_e4m3fn", marks=pytest.mark.gpu),
    ],
)
def test_a_decode_is_bit_equal_alone_and_for_any_number_of_programs(
    head_dim: int, pages: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ((1, 700), (1, 30), (1, 2309), (1, 129))  # the third has splits of two pages
    case = Case(batch, 4, heads=2, kv_heads=1, head_dim=head_dim, pages=pages, sinks=True)
    inputs = case.inputs()
    together, _ = run(case, deepcopy(inputs), device)
    for s in range(len(batch)):
        one = replace(case, batch=batch[s : s + 1], decodes=1)
        output, _ = run(one, alone(inputs, s), device)
        np.testing.assert_array_equal(output[0], together[s])
    for programs in ((1, 1), (3, 1), (16, 8)):  # one for all splits; several each
        monkeypatch.setattr(cuda, "_programs", lambda *_, chosen=programs: chosen)
        monkeypatch.setattr(cuda, "multiprocessors", lambda _, chosen=programs[0]: 7 * chosen - 6)
        output, _ = run(case, deepcopy(inputs), device)
        np.testing.assert_array_equal(output, together)


@pytest.mark.parametrize(
    "name",
    [
        "decode_padding",
        "decode_window",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in HOPPER),
    ],
)
def test_what_begins_early_is_bit_equal(name: str, device: str) -> None:
    """Whatever a kernel does before it waits for the one in front of it."""
    case = (CASES | HOPPER)[name]
    inputs = case.inputs()
    plans: dict[tuple[int, ...], torch.Tensor] = {}  # of a layer before, or none begins early
    output, pages = run(case, deepcopy(inputs), device, plans=plans)
    pdl = has_pdl(torch.device(device))
    early, early_pages = run(case, deepcopy(inputs), device, pdl=pdl, early=True, plans=plans)
    np.testing.assert_array_equal(early, output)
    # As bits: NaN of what nobody wrote is equal to none where NumPy does not know the dtype.
    np.testing.assert_array_equal(early_pages.view(np.uint8), pages.view(np.uint8))


@pytest.mark.parametrize("head_dim", [32, pytest.param(128, marks=pytest.mark.gpu)])
def test_a_prefill_is_bit_equal_in_any_chunks(head_dim: int, device: str) -> None:
    case = Case(((100, 100),), 0, kv_heads=1, head_dim=head_dim)
    check_chunks(case, device, (50, 64, 100))


@pytest.mark.parametrize(
    "form",
    [
        {"soft_cap": 5.0, "sinks": True, "window": 100},
        *(
            pytest.param(form, marks=pytest.mark.gpu)
            for form in ({"soft_cap": 5.0}, {"pages": "float8_e4m3fn"}, {"head_dim": 512})
        ),
    ],
)
def test_a_token_is_bit_equal_in_any_chunk_and_as_one_of_its_own(
    form: dict[str, Any], device: str
) -> None:
    """As the deterministic mode computes it: a decode is a block of one query."""
    case = Case(((150, 150),), 0, **{"kv_heads": 1, "head_dim": 16, **form})
    check_chunks(case, device, (64, 65, 140, 150))


@sums_in_float64()
def check_chunks(case: Case, device: str, ends: tuple[int, ...]) -> None:
    """A prompt in chunks that end there has the bits of the whole; one of one token is a block of
    its own."""
    inputs = case.inputs()
    whole, _ = run(case, deepcopy(inputs), device)
    pages = inputs.kv_cache
    for begin, end in pairwise((0, *ends)):
        block = 1 if end - begin == 1 else 0
        chunk = replace(case, batch=((end - begin, end),), query_block=block)
        cut = {name: getattr(inputs, name)[begin:end] for name in ("qkv", "cos", "sin")}
        part = replace(
            inputs,
            **cut,
            slot_mapping=inputs.slot_mapping[begin:end],
            kv_cache=pages,
            query_start=np.array([0, end - begin], np.int32),
            context_len=np.array([end], np.int32),
        )
        output, pages = run(chunk, part, device)
        np.testing.assert_array_equal(output, whole[begin:end])
