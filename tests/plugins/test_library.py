"""Which instruction set a library runs, and what it says of one that it has not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.plugins.cpu.test_kernels import Inputs, normal, run

from slipstream.errors import EngineMismatchError
from slipstream.plugins import library, native
from slipstream.plugins.linear import WEIGHT_TYPES
from slipstream.plugins.operators import OPERATORS

SETS = library.isas()
INPUTS: Inputs = {"x": normal(3, 640), "weight": normal(640 * 16, seed=1).view(np.uint8)}
ATTRIBUTES = {"in_features": 640, "out_features": 16, "weight_type": WEIGHT_TYPES["float32"]}


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library that looks at the environment again, and at the end runs what it ran before."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()
    monkeypatch.setenv(library.ISA, SETS[0])
    library.load()


def natively(isa: str | None) -> NDArray[Any]:
    """A dense product, of which ``generic`` rounds what AVX does not."""
    y, spec = np.zeros((3, 16), np.float32), OPERATORS["Linear"]
    native.run(spec, native.arguments(spec, {**INPUTS, **ATTRIBUTES}, {"y": y}), isa)
    return y


@pytest.mark.parametrize("isa", SETS)
def test_the_environment_names_what_sessions_and_native_calls_run(
    isa: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(library.ISA, isa)
    with caplog.at_level(logging.INFO, library.__name__):
        assert library.isas() == (isa, *(name for name in SETS if name != isa))
    assert caplog.messages == [f"slipstream.plugins._cpu runs {isa}"]
    np.testing.assert_array_equal(run("Linear", INPUTS, **ATTRIBUTES), natively(isa))
    np.testing.assert_array_equal(natively(None), natively(isa))


@pytest.mark.skipif("avx2" not in SETS, reason="one instruction set")
def test_the_product_tells_instruction_sets_apart() -> None:
    assert (natively("generic") != natively("avx2")).any()


@pytest.mark.parametrize("isa", ["avx1024", "AVX2"])
def test_an_unknown_name_lists_what_this_machine_has(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.ISA, isa)
    message = f"SLIPSTREAM_CPU_ISA is '{isa}'.*set it to one of {', '.join(SETS)}, or unset it"
    with pytest.raises(EngineMismatchError, match=message):
        library.load()


def test_an_empty_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ISA, "")
    assert library.isas()[0] == SETS[0]
