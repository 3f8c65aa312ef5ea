"""Kernels that came with an engine are found, or compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.runtime.cache import FileCacheManager

from slipstream.plugins.cuda import kernel_store
from slipstream.plugins.cuda.kernel_store import KernelCache, offer, read_kernels

METADATA: dict[str, Any] = {
    "name": "kernel",
    "target": {"backend": "cuda", "arch": 90, "warp_size": 32},
    **dict.fromkeys(("num_warps", "num_ctas", "shared"), 1),
    **dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0),
}
CODE = b"\x7fELF and so on"
SCRIPT = """
import sys
from pathlib import Path
import triton
from slipstream.plugins.cuda.kernel_store import offer, pack_kernels, read_kernels
from slipstream.plugins.cuda.precompile import Specialization, compiled_kernels

file = Path(sys.argv[1])
types = {"gate_up": "*bf16", "y": "*bf16"}
from slipstream.plugins.gated_mlp.cuda_kernels import gated_kernel as kernel
signature = {p.name: types.get(p.name, "constexpr") for p in kernel.params}
found = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)

def compiled(block):
    constants = {(2,): 1024, (3,): 1, (4,): block, (5,): True}
    options = {"num_warps": 4, "num_stages": 1, "launch_pdl": True}
    module, name = "slipstream.plugins.gated_mlp.cuda_kernels", "gated_kernel"
    one = Specialization(module, name, signature, constants, {}, options)
    return list(compiled_kernels([one], (9, 0)))

file.write_bytes(pack_kernels(compiled(128)))
triton.knobs.cache.dir = sys.argv[2]  # of another machine
found.clear()
offer(read_kernels(file))
made = compiled(128) + compiled(256)
print(*found, len(made), *made[0].asm)
"""


@pytest.fixture(autouse=True)
def nothing_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_store, "_offered", {})
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)


def entries(metadata: object = METADATA, code: bytes = CODE) -> dict[str, bytes]:
    return {"KEY/kernel.json": json.dumps(metadata).encode(), "KEY/kernel.cubin": code}


def test_an_engine_spares_the_compiler_what_it_brings_and_nothing_else(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "first")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "kernels.zip"), str(tmp_path / "other")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False", "2", "cubin"], done.stderr[-2000:]
    # What came with the engine is not where other programs would take it from.
    assert len(list((tmp_path / "other").rglob("*.cubin"))) == 1


def test_what_was_offered_is_found_beside_what_the_cache_has(tmp_path: Path) -> None:
    offer(entries())
    assert triton.knobs.cache.manager_class is KernelCache
    found = KernelCache("KEY").get_group("kernel.json")
    assert found is not None and Path(found["kernel.cubin"]).read_bytes() == CODE
    assert json.loads(Path(found["kernel.json"]).read_text()) == METADATA
    assert not list((tmp_path / "cache").rglob("*.*"))
    assert KernelCache("OTHER").get_group("kernel.json") is None
    own = {"kernel.json": FileCacheManager("OTHER").put("{}", "kernel.json")}
    FileCacheManager("OTHER").put_group("kernel.json", own)
    assert KernelCache("OTHER").get_group("kernel.json") == own


def test_code_for_the_host_is_never_taken() -> None:
    offer({**entries(), "KEY/__triton_launcher.so": CODE})
    cache = KernelCache("KEY")
    assert cache.get_file("__triton_launcher.so") is None
    assert cache.get_group("__triton_launcher.so") is None


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        {},
        {**METADATA, "shared": "1"},
        {**METADATA, "num_warps": -1},
        {**METADATA, "target": {"backend": "hip"}},
        {**METADATA, "target": 3},
        {**METADATA, "name": None},
    ],
)
def test_metadata_that_triton_cannot_use_is_not_there(metadata: object) -> None:
    offer(entries(metadata))
    assert KernelCache("KEY").get_group("kernel.json") is None


def test_neither_is_code_that_is_none() -> None:
    offer(entries(code=b"MZ"))
    assert KernelCache("KEY").get_group("kernel.json") is None


def test_another_cache_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "manager_class", FileCacheManager)
    offer(entries())
    assert triton.knobs.cache.manager_class is FileCacheManager


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(b"ELF")] ^= 1
    file.write_bytes(data)


def text(file: Path) -> None:
    file.write_text("kernels")


@pytest.mark.parametrize("damage", [halved, flipped, text])
def test_a_damaged_file_holds_nothing(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "kernels.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries().items():
            archive.writestr(name, data)
    assert read_kernels(file) == entries()
    damage(file)
    assert read_kernels(file) == {}
    assert "kernels are compiled" in caplog.text


def test_one_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_store, "_MOST_BYTES", 50)
    file = tmp_path / "kernels.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("K/kernel.cubin", bytes(51))
    assert read_kernels(file) == {}


def test_an_engine_may_have_none(tmp_path: Path) -> None:
    assert read_kernels(tmp_path / "kernels.zip") == {}
