"""Kernels compile in other processes and are found in Triton's cache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from slipstream.plugins.cuda.binding import Context, Run
from slipstream.plugins.cuda.precompile import compile_kernels, record, settle_key
from slipstream.plugins.cuda.standard import BINDINGS
from slipstream.plugins.gated_mlp.cuda_kernels import gated_kernel
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.rms_norm.cuda import rms_norm

SCRIPT = """
from slipstream.plugins.cuda.precompile import Specialization, COMPILE
from slipstream.plugins.gated_mlp.cuda_kernels import gated_kernel as kernel

types = {"gate_up": "*bf16", "y": "*bf16"}
signature = {p.name: types.get(p.name, "constexpr") for p in kernel.params}

def specialization(block, width=1024):
    constants = {(2,): width, (3,): 1, (4,): block, (5,): True}
    options = {"num_warps": 4, "num_stages": 1, "launch_pdl": True}
    module, name = "slipstream.plugins.gated_mlp.cuda_kernels", "gated_kernel"
    return Specialization(module, name, signature, constants, {}, options)

broken = specialization(24)  # no power of two: left to the launch to report
COMPILE([specialization(128), broken, specialization(256), broken], (9, 0))
"""


@pytest.mark.parametrize("compile_all", ["compile_kernels", "compile_in_forks"])
def test_two_kernels_come_to_the_cache_and_a_broken_one_stops_nobody(
    compile_all: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    # Launchers are linked with the driver, which is not here.
    empty, driver = tmp_path / "empty.c", tmp_path / "libcuda.so.1"
    empty.touch()
    subprocess.run(["cc", "-shared", "-o", driver, empty], check=True)
    environment["TRITON_LIBCUDA_PATH"] = str(tmp_path)
    script = SCRIPT.replace("COMPILE", compile_all)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert len(list(tmp_path.rglob("gated_kernel.cubin"))) == 2
    # Both take the same arguments.
    assert len(list(tmp_path.rglob("__triton_launcher*.so"))) == 1


@pytest.mark.kernel
def test_what_nothing_has_written_yet_is_in_range_as_an_index() -> None:
    """Torch's own kernels run while those that write their inputs are only recorded."""
    factors = torch.ones(4)
    context = Context({"factors": factors}, Tactics((9, 0)))
    gather = BINDINGS["Gather"](ir.node("Gather", [*map(named, ("factors", "ids"))]), context)
    found: list[Tensor] = []

    def work() -> None:
        ids = torch.empty(3, 2, dtype=torch.int32)  # as a router makes them, and does not fill
        assert not torch.empty_like(ids).any()
        found.extend(gather(Run({"factors": factors, "ids": ids}, pdl=False)))

    torch.use_deterministic_algorithms(True)  # fills new memory with the largest numbers
    try:
        record([work])
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0].shape == (3, 2)


def named(name: str) -> ir.Value:
    return ir.Value(name=name)


def test_a_key_does_not_depend_on_what_was_compiled_before(tmp_path: Path) -> None:
    file = tmp_path / "kernels_with_constants.py"
    file.write_text(
        "import triton.language as tl\n"
        "from triton.runtime.jit import JITFunction\n"
        "A = tl.constexpr(1)\n\n"
        "def inner(x):\n    return x + A\n\n"
        "inner = JITFunction(inner)\n\n"
        "def outer(x):\n    inner(x)\n\n"
        "outer = JITFunction(outer)\n"
    )

    def key(*, inner_first: bool, settle: bool = True) -> str:
        spec = importlib.util.spec_from_file_location("kernels_with_constants", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if inner_first:
            assert module.inner.cache_key
        if settle:
            settle_key(module.outer)
        return str(module.outer.cache_key)

    assert key(inner_first=True) == key(inner_first=False)
    # What it is for; where this fails, Triton has mended it and ``settle_key`` can go.
    assert key(inner_first=True, settle=False) != key(inner_first=False, settle=False)


@pytest.mark.gpu
def test_recording_launches_nothing() -> None:
    x = torch.ones(3, 1536, dtype=torch.float16, device="cuda")
    weight = torch.ones(1536, dtype=torch.float16, device="cuda")
    kernels = record([lambda: rms_norm(x, weight, 1e-5)] * 2)
    assert [kernel.name for kernel in kernels] == ["rms_norm_kernel"]
    compile_kernels(kernels * 2, torch.cuda.get_device_capability())
    y = rms_norm(x, weight, 1e-5)
    assert isinstance(y, torch.Tensor) and torch.equal(y, x)
    assert record([lambda: rms_norm(x, weight, 1e-5)]) == []


@pytest.mark.gpu
def test_nor_does_recording_what_is_compiled() -> None:
    gate_up = torch.ones(3, 256, dtype=torch.float16, device="cuda")
    y = torch.zeros(3, 128, dtype=torch.float16, device="cuda")

    def work() -> None:
        gated_kernel[(3, 1)](gate_up, y, WIDTH=128, KIND=1, BLOCK=128, PDL=False)

    work()
    assert y.all()
    y.zero_()
    assert record([work]) == []
    assert not y.any()


def test_keys_of_kernels_whose_attributes_are_named_like_functions() -> None:
    code = (
        "from slipstream.plugins.cuda.precompile import settle_key\n"
        "from slipstream.plugins.linear.cuda.kernels.wide import wide_int as kernel\n"
        "settle_key(kernel)  # which calls what has its own name for an attribute\n"
        "assert kernel.hash"
    )
    # Other tests of this process may have had Triton interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
