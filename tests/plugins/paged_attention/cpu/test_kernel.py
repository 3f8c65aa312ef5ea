"""The PagedAttention kernels against the NumPy reference, and the reference against torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.plugins import library, native
from slipstream.plugins.paged_attention import SPEC, reference
from slipstream.plugins.paged_attention.reference import Attributes, Inputs
from slipstream.weights.tensor import numpy_dtype

KV_DTYPES = ("float32", "float16", "int8", "uint8", "float8_e4m3fn")
INTEGERS = ("int8", "uint8")  # uint8: bytes of 16-bit keys and 8-bit values
LAYERS = 2

Sequence = tuple[int, int]  # (query tokens, tokens in the cache after the step)


@dataclass(frozen=True)
class Case:
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 32
    batch: tuple[Sequence, ...] = ((1, 1), (1, 33), (5, 64), (40, 40), (17, 81))
    rotary: int = -1  # half the rotated width; -1: the whole head
    window: int = 0
    soft_cap: float = 0.0
    norm: bool = False
    sinks: bool = False
    kv_parts: int = 2
    v_norm: bool = False
    k_scale: float = 1.0
    v_scale: float = 1.0

    def attributes(self) -> Attributes:
        scale = float(np.float32(self.head_dim**-0.5))
        return Attributes(
            layer=1,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            scale=scale,
            sliding_window=self.window,
            soft_cap=self.soft_cap,
            norm_eps=1e-5,
            kv_parts=self.kv_parts,
            v_norm=int(self.v_norm),
            k_scale=float(np.float32(self.k_scale)),
            v_scale=float(np.float32(self.v_scale)),
        )

    def inputs(self, dtype: str, seed: int = 0) -> Inputs:
        """Random sequences in shuffled pages; unwritten slots hold NaN (or a NaN scale)."""
        rng = np.random.default_rng(seed)
        tokens = sum(n for n, _ in self.batch)
        half = self.head_dim // 2 if self.rotary < 0 else self.rotary
        angles = rng.uniform(0, 6.3, (tokens, half))
        table, slots, num_pages = self._pages(rng)
        width = (self.heads + self.kv_parts * self.kv_heads) * self.head_dim
        scales = np.full((LAYERS, num_pages, 2, self.kv_heads, self.page_size), np.nan, np.float32)
        planes = 3 if dtype == "uint8" else 2
        page = (planes, self.kv_heads, self.page_size * self.head_dim)
        cache = np.zeros((LAYERS, num_pages, *page), numpy_dtype(dtype))
        inputs = Inputs(
            qkv=rng.normal(0, 1.5, (tokens, width)).astype(np.float32),
            cos=np.cos(angles).astype(np.float32),
            sin=np.sin(angles).astype(np.float32),
            kv_cache=cache,
            query_start=np.cumsum([0, *(n for n, _ in self.batch)], dtype=np.int32),
            context_len=np.array([context for _, context in self.batch], np.int32),
            page_table=table,
            slot_mapping=slots,
            kv_scales=scales if dtype in INTEGERS else None,
            q_norm=rng.normal(1, 0.2, self.head_dim).astype(np.float32) if self.norm else None,
            k_norm=rng.normal(1, 0.2, self.head_dim).astype(np.float32) if self.norm else None,
            sinks=rng.normal(1, 1, self.heads).astype(np.float32) if self.sinks else None,
        )
        self._fill(inputs, rng)
        return inputs

    def _pages(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        needed = [-(-context // self.page_size) for _, context in self.batch]
        num_pages = sum(needed) + 2
        free = rng.permutation(num_pages).astype(np.int32)
        table = np.full((len(self.batch), max(needed) + 1), num_pages - 1, np.int32)
        slots: list[int] = []
        for s, (n, context) in enumerate(self.batch):
            table[s, : needed[s]], free = free[: needed[s]], free[needed[s] :]
            positions = np.arange(context - n, context)
            slots += self._slots(table[s], positions).tolist()
        return table, np.array(slots, np.int32), num_pages

    def _slots(self, pages: np.ndarray, positions: np.ndarray) -> np.ndarray:
        slots = pages[positions // self.page_size] * self.page_size + positions % self.page_size
        return np.asarray(slots)

    def _fill(self, inputs: Inputs, rng: np.random.Generator) -> None:
        if inputs.kv_scales is None:
            inputs.kv_cache[:] = np.nan
        attributes = self.attributes()
        for s, (n, context) in enumerate(self.batch):
            written = context if self.kv_parts == 0 else context - n  # before this node
            for slot in self._slots(inputs.page_table[s], np.arange(written)):
                for which in (0, 1):
                    heads = rng.normal(0, 1, (self.kv_heads, self.head_dim))
                    reference.write_page(inputs, attributes, which, int(slot), heads)


def attention(inputs: Inputs, attributes: Attributes, isa: str, threads: int = 1) -> np.ndarray:
    """``reference.paged_attention`` by the kernel of one instruction set."""
    values = {field.name: getattr(part, field.name)
              for part in (inputs, attributes) for field in fields(part)}  # fmt: skip
    return native.call(SPEC, values, isa, threads)[0]


def copy(inputs: Inputs) -> Inputs:
    values: dict[str, Any] = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    copies: dict[str, Any] = {name: None if x is None else x.copy() for name, x in values.items()}
    return Inputs(**copies)


def rows_of(inputs: Inputs, begin: int, end: int, sequence: int, context: int) -> Inputs:
    """A step of query rows [begin, end) alone: the last of ``context`` tokens of a sequence."""
    cut = {name: getattr(inputs, name)[begin:end] for name in ("qkv", "cos", "sin", "slot_mapping")}
    return replace(
        inputs,
        **cut,
        query_start=np.array([0, end - begin], np.int32),
        context_len=np.array([context], np.int32),
        page_table=inputs.page_table[sequence : sequence + 1],
    )


CASES = {
    "default": Case(),
    "one_head": Case(heads=1, kv_heads=1, head_dim=8),
    "no_groups": Case(heads=3, kv_heads=3, head_dim=64),
    "smollm2": Case(heads=9, kv_heads=3, head_dim=64, batch=((1, 64), (70, 70), (33, 300))),
    "llama": Case(heads=8, kv_heads=2, head_dim=128, batch=((1, 100), (50, 90))),
    # Tasks of few rows take several kv heads, here three and then two.
    "uneven_heads": Case(heads=20, kv_heads=5, head_dim=16, batch=((1, 40), (1, 700), (3, 290))),
    "one_kv_head": Case(heads=20, kv_heads=1, head_dim=16, batch=((1, 40), (9, 40))),
    "more_heads_than_block": Case(heads=100, kv_heads=1, head_dim=8, batch=((1, 17), (3, 20))),
    "odd_widths": Case(heads=5, kv_heads=1, head_dim=40),
    "head_80": Case(heads=4, kv_heads=2, head_dim=80, rotary=16),
    "head_72_no_rotary": Case(heads=4, kv_heads=2, head_dim=72, rotary=0),
    "head_256": Case(heads=2, kv_heads=1, head_dim=256, batch=((1, 65), (20, 50))),
    "head_512": Case(heads=2, kv_heads=1, head_dim=512, norm=True, batch=((1, 65), (40, 50))),
    "keys_are_values": Case(kv_parts=1, norm=True),
    "keys_are_values_normed": Case(kv_parts=1, norm=True, v_norm=True, head_dim=24),
    "v_norm": Case(v_norm=True),
    "pages_written_before": Case(kv_parts=0, norm=True, batch=((1, 90), (60, 400), (1, 513))),
    "page_16": Case(page_size=16, batch=((1, 16), (1, 17), (16, 32), (31, 100))),
    "page_48": Case(page_size=48, batch=((1, 300), (100, 100))),
    "page_512": Case(page_size=512, batch=((1, 600), (3, 512))),
    "window": Case(window=7),
    "window_of_pages": Case(window=32, batch=((1, 200), (100, 300), (130, 130))),
    "window_over_splits": Case(window=300, batch=((1, 700), (8, 620), (80, 700))),
    "soft_cap": Case(soft_cap=3.0),
    "norm": Case(norm=True, rotary=8),
    "sinks": Case(sinks=True),
    "sinks_over_splits": Case(sinks=True, batch=((1, 600), (10, 520))),
    "everything": Case(
        k_scale=0.021,
        v_scale=0.3,
        head_dim=24,
        window=50,
        soft_cap=5.0,
        norm=True,
        sinks=True,
        batch=((1, 90), (60, 400), (1, 513)),
    ),
    "long_splits": Case(heads=2, kv_heads=1, head_dim=8, batch=((1, 16500),)),
    "empty_sequence": Case(batch=((0, 40), (2, 40), (0, 3))),
}


@cache
def made(name: str, dtype: str) -> Inputs:
    return CASES[name].inputs(dtype)


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_reference(name: str, dtype: str, isa: str) -> None:
    case = CASES[name]
    ours: Any = copy(made(name, dtype))
    theirs: Any = copy(made(name, dtype))
    output = attention(ours, case.attributes(), isa, threads=2)
    queries = reference.write_pages(theirs, case.attributes())
    assert not np.isnan(output).any()
    # Codes may differ by one unit where float32 and float64 fall on two sides of a tie.
    if dtype in INTEGERS:
        for which in (0, 1):
            got, want = (reference.head_blocks(x, case.attributes(), which) for x in (ours, theirs))
            np.testing.assert_allclose(got.astype(int), want.astype(int), atol=1)
        np.testing.assert_allclose(ours.kv_scales, theirs.kv_scales, rtol=3e-6)
    else:
        rtol, atol = {
            "float32": (1e-5, 2e-6),
            "float16": (1.1e-3, 2e-6),
            "float8_e4m3fn": (0.13, 2.1**-9),
        }[dtype]
        got, want = (x.kv_cache.astype(np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    expected = reference.attend_pages(ours, case.attributes(), queries)
    if dtype not in INTEGERS:
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=2e-5)
        return
    # So may those of a query, which moves its scores; probabilities have 16 bits.
    error = np.abs(output - expected)
    assert np.median(error) < 5e-5 and error.mean() < 1e-4 and error.max() < 2e-3


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_sequence_is_bit_equal_alone_and_on_one_thread(dtype: str, isa: str) -> None:
    case = Case(batch=((1, 40), (1, 900), (20, 520), (100, 130), (3, 3)), sinks=True)
    inputs = case.inputs(dtype)
    together = attention(copy(inputs), case.attributes(), isa, threads=3)
    for s, (begin, end) in enumerate(pairwise(inputs.query_start)):
        alone = rows_of(copy(inputs), begin, end, s, inputs.context_len[s])
        output = attention(alone, case.attributes(), isa, threads=1)
        np.testing.assert_array_equal(output, together[begin:end])


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("form", [{}, {"window": 300, "sinks": True}, {"page_size": 48}])
def test_chunks_of_a_prefill_equal_the_whole_bit_for_bit(
    form: dict[str, Any], dtype: str, isa: str
) -> None:
    """A token's result is the same as a decode, in a chunk of any size, and over splits of keys."""
    case = Case(heads=6, kv_heads=2, head_dim=24, batch=((600, 600),), soft_cap=30.0, **form)
    inputs = case.inputs(dtype)
    whole = attention(inputs, case.attributes(), isa, threads=2)
    for size in (1, 7, 64):
        for begin in range(0, 600, 43):
            end = min(begin + size, 600)
            output = attention(rows_of(copy(inputs), begin, end, 0, end), case.attributes(), isa)
            np.testing.assert_array_equal(output, whole[begin:end], f"{size} from {begin} on")


def test_every_half_survives_its_page(isa: str) -> None:
    """Softmax over a single key is exactly 1, so the output is v as the page holds it."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    values = np.concatenate([halves, -halves]).astype(np.float32)
    small = np.array([0.5, 1.5, 2.5, 1023.75]) * 2.0**-24
    ties = np.array([2049, 2051, 65519.996, 65520, 1e9, *small], np.float32)
    values = np.concatenate([values, ties, -ties])
    dim = 256
    values = np.pad(values, (0, -len(values) % dim)).reshape(-1, dim)
    case = Case(heads=1, kv_heads=1, head_dim=dim, page_size=16, batch=((1, 1),) * len(values))
    inputs = case.inputs("float16")
    inputs.qkv[:, 2 * dim :] = values
    output = attention(inputs, case.attributes(), isa)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("unit", [1.0, 0.25])
def test_every_float8_survives_its_page(isa: str, unit: float) -> None:
    """As with halves; between two neighbours the even one is taken, beyond 448 there is 448."""
    codes = np.arange(0x7F, dtype=np.uint8).view(numpy_dtype("float8_e4m3fn")).astype(np.float32)
    ties = (codes[1:] + codes[:-1]) / 2
    near = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))
    values = np.concatenate(
        [codes, ties, *near, np.array([464, 465, 1e9, np.inf, 1e-9], np.float32)]
    )
    values = np.concatenate([values, -values])
    dim = 256
    padded = np.pad(values, (0, -len(values) % dim)).reshape(-1, dim)
    case = Case(heads=1, kv_heads=1, head_dim=dim, page_size=16, batch=((1, 1),) * len(padded))
    inputs = case.inputs("float8_e4m3fn")
    inputs.qkv[:, 2 * dim :] = padded * np.float32(unit)
    output = attention(inputs, replace(case.attributes(), v_scale=unit), isa)
    clipped = np.clip(padded, -448, 448).astype(numpy_dtype("float8_e4m3fn"))
    np.testing.assert_array_equal(output, clipped.astype(np.float32) * np.float32(unit))


def test_a_nan_stays_one_in_a_float8_page(isa: str) -> None:
    case = Case(heads=1, kv_heads=1, head_dim=24, page_size=16, batch=((1, 1), (1, 1)))
    inputs = case.inputs("float8_e4m3fn")
    inputs.qkv[1, -1] = np.nan
    output = attention(inputs, case.attributes(), isa)
    assert np.isnan(output[1, -1]) and np.isnan(output).sum() == 1


@pytest.mark.parametrize("dtype", INTEGERS)
def test_zero_heads_have_zero_scale_in_pages_of_integers(dtype: str, isa: str) -> None:
    case = Case(batch=((3, 3),))
    inputs = case.inputs(dtype)
    inputs.qkv[:] = 0
    output = attention(inputs, case.attributes(), isa)
    np.testing.assert_array_equal(output, 0)
    slots = inputs.slot_mapping
    scales = inputs.kv_scales
    assert scales is not None
    pages, offsets = np.divmod(slots, case.page_size)
    np.testing.assert_array_equal(scales[1, pages, :, :, offsets], 0)


@pytest.mark.parametrize("size", [1.0, 1e18, 1e-12])
@pytest.mark.parametrize("dim", [8, 64, 128, 512])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_sums_of_the_largest_codes_fit(dtype: str, dim: int, size: float, isa: str) -> None:
    """All products of a score have one sign and their largest size, and so have those of an output:
    a sum that wrapped around would turn a key that is like the query into its opposite."""
    case = Case(heads=1, kv_heads=1, head_dim=dim, page_size=512, rotary=0, batch=((512, 512),))
    inputs = case.inputs(dtype)
    signs = np.where(np.arange(512) % 2 == 0, 1.0, -1.0).astype(np.float32)[:, None]
    inputs.qkv[:, :dim] = size
    inputs.qkv[:, dim : 2 * dim] = signs * np.float32(size)
    inputs.qkv[:, 2 * dim :] = signs
    # Scores of 4 and -4.
    attributes = replace(case.attributes(), scale=float(np.float32(4 / dim / size**2)))
    output = attention(inputs, attributes, isa)[1::2]
    expected = (np.exp(4.0) - np.exp(-4.0)) / (np.exp(4.0) + np.exp(-4.0))
    np.testing.assert_allclose(output, expected, rtol=2e-4)


@pytest.mark.parametrize("place", [0, 1000])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_key_that_says_little_takes_no_digits_from_others(
    dtype: str, place: int, isa: str
) -> None:
    """Many heads look at a first token that has hardly a value, or at nothing: what is left for
    others are thousandths, and in sum all that they say. One large value, to which nobody looks,
    is no measure either."""
    case = Case(heads=1, kv_heads=1, head_dim=64, batch=((1100, 1100),), rotary=0)
    inputs = case.inputs(dtype)
    inputs.qkv[:] *= 0.2
    query, key, value = np.split(inputs.qkv, 3, axis=1)
    query[:, 3] = 4
    key[:, 3] = 0
    key[place] = 8 * 11 / 4 * np.eye(64, dtype=np.float32)[3]
    key[500, 3] = -8
    value += 0.5
    value[place] *= 1e-3
    value[500] *= 1e3
    theirs = copy(inputs)
    output = attention(inputs, case.attributes(), isa)[place + 1 :]
    expected = reference.paged_attention(theirs, case.attributes())[place + 1 :]
    errors = np.linalg.norm(output - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < 5e-4


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_what_is_no_number_stays_none(dtype: str, number: float, isa: str) -> None:
    """In a query it spoils that row; in a key or value, all rows of its sequence that see it."""
    case = Case(heads=1, kv_heads=1, head_dim=24, batch=((40, 40), (40, 40)), rotary=0)
    clean = case.inputs(dtype)
    expected = attention(copy(clean), case.attributes(), isa)
    query, key, value = copy(clean), copy(clean), copy(clean)
    query.qkv[13, 7] = number
    key.qkv[13, 24 + 7] = number
    value.qkv[13, 48 + 7] = number
    output = attention(query, case.attributes(), isa)
    assert np.isnan(output[13]).all()
    np.testing.assert_array_equal(np.delete(output, 13, 0), np.delete(expected, 13, 0))
    for inputs in (key, value):
        output = attention(inputs, case.attributes(), isa)
        assert np.isnan(output[13:40]).all()
        np.testing.assert_array_equal(output[:13], expected[:13])
        np.testing.assert_array_equal(output[40:], expected[40:])


# Every array ends where memory that may be touched ends: one element more is a segmentation fault.
_AT_THE_END_OF_MEMORY = """
import ctypes, itertools, mmap, sys
import ml_dtypes
import numpy as np
from slipstream.plugins import native
from slipstream.plugins.paged_attention import SPEC

protect = ctypes.CDLL(None).mprotect
protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

def ones(*shape, dtype="float32"):
    array = np.ones(shape, dtype)
    room = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert protect(guard, mmap.PAGESIZE, 0) == 0
    moved = np.frombuffer(memory, np.uint8, array.nbytes, room - array.nbytes)
    moved = moved.view(array.dtype).reshape(shape)
    moved[:] = array
    return moved

def ints(*values):
    return np.array(values, np.int32)

dtypes = ("float32", "float16", "int8", "uint8", ml_dtypes.float8_e4m3fn)
for dtype, dim, tokens in itertools.product(dtypes, (8, 24, 32, 72), (1, 16)):
    print(dtype, dim, tokens, flush=True)
    values = dict(
        qkv=ones(tokens, 3 * dim),
        cos=ones(tokens, dim // 2),
        sin=ones(tokens, dim // 2),
        kv_cache=ones(1, 1, 3 if dtype == "uint8" else 2, 1, 16 * dim, dtype=dtype),
        query_start=ints(0, tokens),
        context_len=ints(16),
        page_table=ints(0).reshape(1, 1),
        slot_mapping=ints(*range(16 - tokens, 16)),
        kv_scales=ones(1, 1, 2, 1, 16) if dtype in ("int8", "uint8") else None,
        q_norm=ones(dim),
        k_norm=ones(dim),
        sinks=ones(1),
        layer=0,
        num_heads=1,
        num_kv_heads=1,
        head_dim=dim,
        page_size=16,
        scale=1.0,
    )
    native.call(SPEC, values, sys.argv[1])
"""


def test_nothing_is_read_beyond_an_array(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AT_THE_END_OF_MEMORY, isa],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"died of {done.returncode} at {last}: {done.stderr}"


def test_unknown_instruction_set_is_a_value_error() -> None:
    case = Case(batch=((1, 1),))
    with pytest.raises(ValueError, match="no kernels for 'mmx'"):
        attention(case.inputs("float32"), case.attributes(), "mmx")


def test_reference_matches_torch() -> None:
    case = Case(heads=6, kv_heads=2, head_dim=16, batch=((50, 50),))
    inputs, a = case.inputs("float32"), case.attributes()
    heads = torch.from_numpy(inputs.qkv.astype(np.float64)).reshape(50, -1, 16).transpose(0, 1)
    angles = torch.from_numpy(inputs.cos + 1j * inputs.sin)
    pairs = torch.complex(heads[:8, :, :8].contiguous(), heads[:8, :, 8:].contiguous()) * angles
    turned = torch.cat([pairs.real, pairs.imag], dim=-1)
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = turned[None, :6], turned[None, 6:], heads[None, 8:]
    by_torch = attention(q, k, v, is_causal=True, scale=a.scale, enable_gqa=True)
    expected = by_torch[0].transpose(0, 1).reshape(50, -1).numpy()
    np.testing.assert_allclose(reference.paged_attention(inputs, a), expected, rtol=1e-5, atol=1e-6)
