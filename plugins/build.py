"""Compiles operators written in C++ into a library of their own, for ``setup.py``.

A package with an operator of its own builds it as this one builds its own:

    setup(
        ext_modules=[NativeExtension("my_package._cpu", [SPEC], ["my_package/soft_cap/cpu"])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
    )

The library knows nothing of Python: it is found by its path (``library.py``), and one wheel serves
every version.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from slipstream.cores import usable_cores
from slipstream.plugins.cpu.codegen import generate, generate_signatures
from slipstream.plugins.library import SUFFIX
from slipstream.plugins.spec import OperatorSpec

KERNEL = "kernel.cpp"  # compiled once an instruction set; other files once
_PLUGINS = Path(__file__).parent
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_X86_ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", *_AVX2],
    "avx2": _AVX2,
    "generic": [],
}
_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
]


class NativeExtension(Extension):  # type: ignore[misc]
    """The library ``name`` (a module's dotted name) of the C++ kernels of ``operators``.

    ``folders`` are relative to ``setup.py``; each has a ``kernel.cpp`` and what that includes.
    """

    def __init__(
        self, name: str, operators: Sequence[OperatorSpec], folders: Sequence[str | Path]
    ) -> None:
        files = [path for folder in folders for path in sorted(Path(folder).iterdir())]
        super().__init__(
            name,
            sources=[str(path) for path in files if path.suffix == ".cpp"],
            depends=[str(path) for path in files if path.suffix == ".h"],
        )
        self.operators = tuple(operators)


class BuildNative(build_ext):  # type: ignore[misc]
    """Compiles every kernel once an instruction set; ``cpu/kernels.cpp`` chooses at run time."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's file: without the version of Python, of which it knows nothing."""
        return str(Path(*fullname.split("."))) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        """Generate the headers of the extension's operators, compile and link."""
        assert isinstance(ext, NativeExtension), ext
        temp = Path(self.build_temp) / ext.name
        temp.mkdir(parents=True, exist_ok=True)
        (temp / "operators.h").write_text(generate(ext.operators))
        (temp / "signatures.h").write_text(generate_signatures(ext.operators))
        common = [_PLUGINS / "cpu" / name for name in ("kernels.cpp", "registration.cpp")]
        kernels = [source for source in ext.sources if Path(source).name == KERNEL]
        others = [source for source in ext.sources if source not in kernels]
        jobs: list[tuple[str, Path, list[str], str | None]] = [
            (source, temp, flags, isa)
            for isa, flags in self.instruction_sets().items()
            for source in kernels
        ]
        jobs += [(source, temp, [], None) for source in (*map(str, common), *others)]
        with ThreadPoolExecutor(usable_cores()) as pool:
            objects = [
                name
                for names in pool.map(self._compile, *zip(*jobs, strict=True))
                for name in names
            ]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, target_lang="c++", extra_postargs=["-pthread"]
        )

    @staticmethod
    def instruction_sets() -> dict[str, list[str]]:
        """The compiler's flags for each instruction set of this machine's architecture."""
        return _X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}

    def _compile(self, source: str, temp: Path, flags: list[str], isa: str | None) -> list[str]:
        objects: list[str] = self.compiler.compile(
            [source],
            output_dir=str(temp / (isa or "common")),
            macros=[("SLIPSTREAM_ISA", isa)] if isa else [],
            include_dirs=[str(temp), str(_PLUGINS)],
            extra_postargs=[*_FLAGS, "-include", str(_PLUGINS / "cpu" / "old_libm.h"), *flags],
        )
        return objects


class NativeWheel(bdist_wheel):  # type: ignore[misc]
    """A wheel of a package whose native code is such a library: one for every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none`` and the platform."""
        return "py3", "none", super().get_tag()[2]
