"""The library knows nothing of Python and needs no new Linux; one wheel serves every Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution

from slipstream.errors import MissingDependencyError
from slipstream.plugins import library
from slipstream.plugins.build import BuildNative, NativeExtension, NativeWheel

# What a wheel for manylinux_2_28 may need; Red Hat's compilers for it have gcc 8's libstdc++.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0)}
LIBRARIES = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}


@pytest.fixture
def elf() -> Any:  # noqa: ANN401 - pyelftools has no types
    elffile = pytest.importorskip("elftools.elf.elffile")
    with Path(library.path()).open("rb") as file:
        yield elffile.ELFFile(file)


def test_the_library_loads_on_the_oldest_linux_that_the_wheel_is_for(elf: Any) -> None:  # noqa: ANN401
    needed = elf.get_section_by_name(".gnu.version_r")
    versions = [aux.name for _, auxiliaries in needed.iter_versions() for aux in auxiliaries]
    assert any(version.startswith("GLIBC_") for version in versions)
    for version in versions:
        kind, _, number = version.partition("_")
        assert tuple(map(int, number.split("."))) <= NEWEST[kind], version


def test_the_library_needs_no_python(elf: Any) -> None:  # noqa: ANN401
    needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    assert needed <= LIBRARIES | {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    assert not [symbol.name for symbol in symbols if symbol.name.startswith(("Py", "_Py"))]


def test_its_file_is_named_without_a_version_of_python() -> None:
    assert Path(library.path()).name == "_cpu.so"
    command = BuildNative(Distribution({"ext_modules": [NativeExtension("a.b._cpu", [], [])]}))
    assert command.get_ext_filename("a.b._cpu") == "a/b/_cpu.so"


def test_a_wheel_is_for_every_python_and_one_platform() -> None:
    command = NativeWheel(Distribution({"ext_modules": [NativeExtension("a._cpu", [], [])]}))
    command.ensure_finalized()
    python, abi, platform = command.get_tag()
    assert (python, abi) == ("py3", "none") and platform.startswith(("linux_", "macosx_"))


def test_a_library_that_was_not_compiled_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uncompiled").mkdir()
    (tmp_path / "uncompiled" / "__init__.py").touch()
    # Of another Python's, which nobody brings up to date.
    (tmp_path / "uncompiled" / "_cpu.cpython-311-x86_64-linux-gnu.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"uncompiled._cpu are not compiled.*pip inst"):
        library.path("uncompiled._cpu")
    (tmp_path / "uncompiled" / "_cpu.so").touch()
    library.path.cache_clear()
    assert library.path("uncompiled._cpu") == str(tmp_path / "uncompiled" / "_cpu.so")


@pytest.mark.parametrize("module", ["nobody_has_this._cpu", "math._cpu"])
def test_a_package_that_is_not_there_is_the_same(module: str) -> None:
    with pytest.raises(MissingDependencyError, match=f"{module} are not compiled"):
        library.path(module)
