"""The CUDA kernels of Linear and Embedding against the NumPy reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.plugins.linear.weights import random_weight

from slipstream.errors import CheckpointError
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.linear import reference
from slipstream.plugins.linear.cuda.blas import dequantize
from slipstream.plugins.linear.cuda.candidates import candidate_tactics
from slipstream.plugins.linear.cuda.linear import embedding, linear
from slipstream.plugins.linear.cuda.packing import pack
from slipstream.plugins.linear.cuda.tactics import (
    Tactic,
    multiplies_in,
    vector_size,
    wide_tactic,
)
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.linear.cuda.wide import Tile
from slipstream.weights.tensor import Activation, QuantTensor, WeightFormat

pytestmark = pytest.mark.kernel

Floats = NDArray[np.float32]
N, K = 40, 576
FORMATS = {
    "bf16": WeightFormat((N, K), "dense", "bfloat16"),
    "fp16": WeightFormat((N, K), "dense", "float16"),
    "fp8": WeightFormat((N, K), "float8_e4m3", "float32", 8, K, activation="token"),
    "fp8static": WeightFormat((48, K), "float8_e4m3", "float32", 8, K, activation="static"),
    "fp8block": WeightFormat((144, K), "float8_e4m3", "float32", 8, 128, "midpoint", 128, "group"),
    "int4g64z": WeightFormat((N, K), "int", "float16", 4, 64, "zero"),
    "int4g32o": WeightFormat((N, K), "int", "float16", 4, 32, "offset"),
    "int4g128m": WeightFormat((N, 640), "int", "float32", 4, 128, "midpoint"),
    "int4g128z": WeightFormat((N, 1024), "int", "float16", 4, 128, "zero"),
    "int8g64z": WeightFormat((N, K), "int", "float16", 8, 64, "zero"),
    "int8row": WeightFormat((N, K), "int", "float32", 8, K, "midpoint", activation="token"),
}
# Whole chunks of words, as wide wants them; the last tile has rows of its own alone.
WIDE = {
    "wide int4g128m": WeightFormat((200, 1024), "int", "float32", 4, 128, "midpoint"),
    "wide int4g64z": WeightFormat((200, 768), "int", "float16", 4, 64, "zero"),
    "wide int4g32o": WeightFormat((200, 1024), "int", "float16", 4, 32, "offset"),
    "wide int8g128o": WeightFormat((200, 1152), "int", "float16", 8, 128, "offset"),
    "wide int8g64z": WeightFormat((200, 640), "int", "float32", 8, 64, "zero"),
    "wide int8row": WeightFormat((200, 640), "int", "float32", 8, 640, "midpoint"),
}
# Whose kernels are those of integers but for the decoding; the last chunk is not whole.
MXFP4 = WeightFormat((24, 288), "float4_e2m1", "float8_e8m0fnu", 4, 32)
EXTRAS = (
    "",
    "bias",
    "residual",
    "norm",
    "gated",
    "gated gelu_tanh",
    "bias residual norm gated clamped",
)


class Case:
    """A weight, and random inputs of a Linear as torch tensors and as the reference takes them."""

    def __init__(self, name: str, tokens: int, extras: str, device: str, seed: int = 0) -> None:
        fmt = {**FORMATS, **WIDE, "mxfp4": MXFP4}[name]
        n, k = fmt.shape
        self.dtype = torch.float16 if fmt.dtype == "float16" else torch.bfloat16
        self.weight = random_weight(fmt, seed)
        self.device_weight = on_device(self.weight, device)
        self.gated = "gated" in extras
        rng = np.random.default_rng(seed + 1)
        width = n // 2 if self.gated else n
        shapes: dict[str, tuple[int, ...]] = {
            "bias": (n,),
            "residual": (tokens, width),
            "norm_weight": (k,),
        }
        arrays = {
            key: torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32)).to(self.dtype)
            for key, shape in shapes.items()
            if key.split("_")[0] in extras
        }
        self.x = torch.from_numpy(rng.normal(0, 1, (tokens, k)).astype(np.float32)).to(self.dtype)
        self.inputs: dict[str, Any] = {key: value.to(device) for key, value in arrays.items()}
        gate = next((kind for name, kind in GATES.items() if name in extras), 0)
        self.options: dict[str, Any] = {"gated": self.gated, "gate": gate, "norm_eps": 1e-5}
        exact: dict[str, Any] = {key: value.float().numpy() for key, value in arrays.items()}
        self.exact = {"x": self.x.float().numpy(), **exact, **self.options}
        self.want = self.reference("none")
        self.x = self.x.to(device)

    def reference(self, activation: Activation | None = None) -> Floats:
        """The product of x, rounded as the format says unless it is said here."""
        return reference.linear(weight=self.weight, activation=activation, **self.exact)

    def run(self, tactic: Tactic, out_dtype: torch.dtype = torch.float32) -> Floats:
        n = self.want.shape[1]
        out = torch.full((self.x.shape[0], n), torch.nan, dtype=out_dtype, device=self.x.device)
        got = linear(
            self.x,
            self.device_weight,
            tactic=tactic,
            out=out,
            out_dtype=out_dtype,
            **self.inputs,
            **self.options,
        )
        return np.asarray(got.float().cpu().numpy())


def on_device(weight: QuantTensor, device: str) -> DeviceWeight:
    return DeviceWeight.from_blob(torch.from_numpy(pack(weight)).to(device), weight.format)


def assert_close(got: Floats, want: Floats, tolerance: float) -> None:
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(np.abs(want).max()))


def assert_close_as_blas(got: Floats, case: Case, name: str, extras: str) -> None:
    """x is rounded to 8 bits where the format says so, and by the interpreter towards zero."""
    kind = multiplies_in(FORMATS[name])
    want = case.want if kind == "dense" else case.reference()
    once = {"dense": 1e-2, "int8": 2e-2, "float8": 0.15 if interpreting() else 5e-2}[kind]
    assert_close(got, want, 2 * once if "gated" in extras else once)


def gemv(name: str, rows: int = 32, stages: int = 1, lanes: int = 32) -> Tactic:
    size = vector_size(FORMATS.get(name, MXFP4))
    return Tactic("gemv", rows, lanes * size, 16, stages, True)


@pytest.mark.parametrize("tokens", [1, 3] if interpreting() else [1, 2, 3, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_gemv(name: str, tokens: int, device: str) -> None:
    """Every format and number of tokens, each with some of the epilogues and tiles."""
    index = list(FORMATS).index(name) + tokens
    case = Case(name, tokens, EXTRAS[index % len(EXTRAS)], device)
    tactic = gemv(name, (32, 16)[index % 2], (1, 2)[tokens % 2], (32, 16)[index // 2 % 2])
    assert_close(case.run(tactic), case.want, 2e-5)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("name", ["fp8block", "int4g64z"])
def test_gemv_epilogues(name: str, extras: str, device: str) -> None:
    case = Case(name, 1, extras, device)
    assert_close(case.run(gemv(name)), case.want, 2e-5)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_dot(name: str, swap: bool, device: str) -> None:
    index = list(FORMATS).index(name)
    for tokens, split in ((5, 1), (16, 2), (33, 1)):
        extras = EXTRAS[(index + tokens) % len(EXTRAS)]
        case = Case(name, tokens, extras, device)
        tactic = Tactic("dot", 32, 64, 4, 2, split == 1 and index % 2 == 0, split, swap)
        assert_close(case.run(tactic), case.want, 2e-2)


def wide(rows: int, tile: int, case: Case, split: int = 1) -> Tactic:
    return wide_tactic(Tile(rows, tile, split), case.gated)


# Triton's interpreter does not know Gluon.
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


@hopper
@pytest.mark.parametrize("name", WIDE)
def test_wide(name: str, device: str) -> None:
    """Every format with each tile, and the epilogues in turn."""
    index = list(WIDE).index(name)
    tiles = [(64, 64, 64, 2), (128, 64, 100, 1), (128, 128, 130, 3), (128, 256, 300, 2)]
    tiles += [(64, 128, 128, 1), (192, 128, 130, 2)]
    for at, (rows, tile, tokens, split) in enumerate(tiles):
        extras = EXTRAS[(index + at) % len(EXTRAS)]
        case = Case(name, tokens, extras, device)
        assert_close(case.run(wide(rows, tile, case, split)), case.want, 2e-2)
        assert not case.device_weight.counters.any()


@hopper
@pytest.mark.parametrize("extras", EXTRAS)
def test_wide_epilogues(extras: str, device: str) -> None:
    """With and without a split of K, in the type of x; two runs give the same bits."""
    for split in (1, 2):
        case = Case("wide int4g64z", 70, extras, device)
        tactic = wide(128, 128, case, split)
        got = case.run(tactic, case.dtype)
        assert_close(got, case.want, 2e-2)
        np.testing.assert_array_equal(case.run(tactic, case.dtype), got)


@hopper
def test_a_row_of_wide_does_not_feel_the_others(device: str) -> None:
    case = Case("wide int4g128m", 100, "residual norm", device)
    tactic = wide(128, 64, case, 2)
    whole = case.run(tactic)
    case.x[1:] = torch.nan
    case.inputs["residual"][1:] = torch.nan
    np.testing.assert_array_equal(case.run(tactic)[0], whole[0])


@pytest.mark.parametrize(
    ("tactic", "tokens", "extras", "tolerance"),
    [
        (gemv("mxfp4", rows=8), 2, "bias residual norm gated clamped", 2e-5),
        (Tactic("dot", 32, 64, num_stages=2, swap=True), 5, "bias", 2e-2),
        (Tactic("blas"), 3, "residual", 1e-2),
    ],
    ids=lambda value: value.kernel if isinstance(value, Tactic) else "",
)
def test_mxfp4(tactic: Tactic, tokens: int, extras: str, tolerance: float, device: str) -> None:
    case = Case("mxfp4", tokens, extras, device)
    assert_close(case.run(tactic), case.want, tolerance)


def test_rows_of_mxfp4_with_every_exponent(device: str) -> None:
    """From 2**-127 to the largest that is packed; 2**65 is refused."""
    weight = random_weight(replace(MXFP4, shape=(24, 256)))
    exponents = np.arange(192, dtype=np.uint8).reshape(24, 8)
    weight = replace(weight, scale=exponents.view(ml_dtypes.float8_e8m0fnu))
    ids = torch.arange(24, dtype=torch.int32, device=device)
    got = embedding(ids, on_device(weight, device), torch.bfloat16)
    np.testing.assert_array_equal(got.float().cpu().numpy(), weight.dequantize())
    too_large = (exponents + np.uint8(1)).view(ml_dtypes.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match="beyond 2\\*\\*64"):
        pack(replace(weight, scale=too_large))


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("name", FORMATS)
def test_blas(name: str, extras: str, device: str) -> None:
    tokens = 17 if "bias" in extras or not extras else 1
    case = Case(name, tokens, extras, device)
    assert_close_as_blas(case.run(Tactic("blas")), case, name, extras)


@pytest.mark.parametrize("extras", ["", "residual norm", "bias residual norm gated clamped"])
@pytest.mark.parametrize("activation", ["token", "static"])
def test_dot_of_rounded_x(
    activation: Activation, extras: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "rows", replace(FORMATS["fp8static"], activation=activation))
    case = Case("rows", 18, extras, device)
    split, swap = (2, True) if extras else (1, False)
    tactic = Tactic("dot", 32, 64, num_stages=2, split_k=split, swap=swap, rounds=True)
    got, blas = case.run(tactic), case.run(Tactic("blas"))
    assert_close_as_blas(got, case, "rows", extras)
    assert_close(got, blas, 0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_blas_in_the_type_of_x(name: str, device: str) -> None:
    for extras in ("residual", "bias"):
        case = Case(name, 33, extras, device)
        assert_close_as_blas(case.run(Tactic("blas"), case.dtype), case, name, extras)


@pytest.mark.parametrize(
    "tactic",
    [gemv("int4g64z"), Tactic("dot", 32, 64, num_stages=2), Tactic("blas")],
    ids=lambda t: t.kernel,
)
def test_a_row_does_not_feel_the_others(tactic: Tactic, device: str) -> None:
    """With NaN in all others, and alone with the same kernel, it has the same bits."""
    tokens = 4 if tactic.kernel == "gemv" else 18
    case = Case("int4g64z", tokens, "residual norm", device)
    whole = case.run(tactic)
    case.x[1:] = torch.nan
    case.inputs["residual"][1:] = torch.nan
    np.testing.assert_array_equal(case.run(tactic)[0], whole[0])
    if tactic.kernel != "blas":  # whose library chooses by the number of rows
        case.x, case.want = case.x[:1], case.want[:1]
        case.inputs["residual"] = case.inputs["residual"][:1]
        np.testing.assert_array_equal(case.run(tactic)[0], whole[0])


@pytest.mark.parametrize(
    "tactic",
    [
        Tactic("gemv", 16, 1024, 8, 1, True),
        Tactic("dot", 32, 64, num_stages=2),
        Tactic("dot", 64, 64, num_stages=2, split_k=2, swap=True),
        Tactic("blas"),
    ],
    ids=str,
)
def test_what_lies_behind_a_weight_is_not_used(tactic: Tactic, device: str) -> None:
    """K is padded in the codes but not in the scales, which end with the blob here."""
    fmt = WeightFormat((64, 576), "int", "float16", 4, 32, "midpoint")
    weight = random_weight(fmt)
    blob = torch.from_numpy(pack(weight))
    room = torch.full((len(blob) + 256,), 255, dtype=torch.uint8, device=device)  # NaN, as floats
    room[: len(blob)] = blob
    x = torch.randn(3, 576).to(torch.bfloat16)
    got = linear(
        x.to(device), DeviceWeight.from_blob(room[: len(blob)], fmt), out_dtype=torch.float32,
        tactic=tactic,
    )  # fmt: skip
    want = reference.linear(x.float().numpy(), weight, activation="none")
    assert_close(got.cpu().numpy(), want, 1e-2)


def test_counters_are_left_at_zero(device: str) -> None:
    case = Case("bf16", 16, "", device)
    tactic = Tactic("dot", 16, 64, num_stages=2, split_k=4)
    first = case.run(tactic)
    assert not case.device_weight.counters.any()
    np.testing.assert_array_equal(case.run(tactic), first)


def test_result_of_the_type_of_x(device: str) -> None:
    case = Case("fp8", 2, "residual", device)
    assert_close(case.run(gemv("fp8"), torch.bfloat16), case.want, 1e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize(name: str, device: str) -> None:
    weight = random_weight(FORMATS[name])
    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    got = dequantize(on_device(weight, device), dtype).float().cpu().numpy()
    assert_close(got, weight.dequantize(), 8e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_embedding(name: str, device: str) -> None:
    fmt = FORMATS[name]
    weight = random_weight(fmt)
    ids = torch.tensor([3, -1, -1, fmt.shape[0] - 1, fmt.shape[0] + 9, -7], dtype=torch.int32)
    last = torch.tensor([11, 12, 13], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 2, 0, 1, 99, -5], dtype=torch.int32, device=device)
    dtype = torch.float16 if fmt.dtype == "float16" else torch.bfloat16
    got = embedding(ids.to(device), on_device(weight, device), dtype, last_tokens=last, slots=slots)
    rows = [3, 13, 11, fmt.shape[0] - 1, fmt.shape[0] - 1, 0]
    want = reference.embedding(np.array(rows, np.int32), weight)
    assert_close(got.float().cpu().numpy(), want, 8e-3)


def test_embedding_without_last_tokens(device: str) -> None:
    weight = random_weight(FORMATS["bf16"])
    ids = torch.tensor([5, -1], dtype=torch.int32, device=device)
    got = embedding(ids, on_device(weight, device), torch.bfloat16)
    want = reference.embedding(np.array([5, 0], np.int32), weight)
    np.testing.assert_array_equal(got.float().cpu().numpy(), want)


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_of_a_part(name: str, device: str) -> None:
    """Zeros for tokens before it and behind it, one that only the device knows among them."""
    weight = random_weight(FORMATS[name])
    rows = weight.format.shape[0]
    ids = torch.tensor([99, 100, 100 + rows - 1, 100 + rows, -1, -1], dtype=torch.int32)
    last = torch.tensor([103, 7], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.int32, device=device)
    first = torch.tensor([100], dtype=torch.int32, device=device)
    got = embedding(
        ids.to(device), on_device(weight, device), torch.float16,
        last_tokens=last, slots=slots, first=first,
    )  # fmt: skip
    known = np.array([99, 100, 100 + rows - 1, 100 + rows, 103, 7], np.int32)
    want = reference.embedding_shard(known, weight, np.array([100], np.int32))
    assert not want[[0, 3, 5]].any() and want[[1, 2, 4]].any(axis=1).all()
    assert_close(got.float().cpu().numpy(), want, 8e-3)


def test_every_candidate_agrees(device: str) -> None:
    """All tactics that may be chosen for a shape compute the same."""
    for tokens in (1, 16):
        case = Case("int8g64z", tokens, "", device)
        found = candidate_tactics(FORMATS["int8g64z"], False, tokens, (9, 0))
        for tactic in found[:: 1 + len(found) // 6]:
            assert_close(case.run(tactic), case.want, 2e-2)
