"""Builds the native CPU plugins: every ``plugins/*/cpu.cpp`` once per instruction set, one shared
library."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PLUGINS = Path("plugins")
X86_ISAS = {
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512vnni",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "generic": [],
}
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
]


class BuildNativePlugins(build_ext):
    """Compiles the kernels per instruction set; registration.cpp chooses among them at run time."""

    def build_extension(self, ext: Extension) -> None:
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        (temp / "operators.h").write_text(self._generated_header())
        isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
        include = [str(temp), str(PLUGINS)]
        objects = []
        for isa, flags in isas.items():
            objects += self.compiler.compile(
                ext.sources[1:],
                output_dir=str(temp / isa),
                macros=[("SLIPSTREAM_ISA", isa)],
                include_dirs=include,
                extra_postargs=FLAGS + flags,
                depends=ext.depends,
            )
        objects += self.compiler.compile(
            ext.sources[:1],
            output_dir=str(temp),
            include_dirs=include,
            extra_postargs=FLAGS,
            depends=ext.depends,
        )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, target_lang="c++", extra_postargs=["-pthread"]
        )

    @staticmethod
    def _generated_header() -> str:
        sys.path.insert(0, str(ROOT / "src"))
        from slipstream.plugins.cpu.codegen import generate
        from slipstream.plugins.operators import OPERATORS

        return generate(OPERATORS)


setup(
    ext_modules=[
        Extension(
            "slipstream.plugins._cpu",
            sources=[
                str(PLUGINS / "cpu" / "registration.cpp"),
                str(PLUGINS / "linear" / "cpu.cpp"),
                str(PLUGINS / "paged_attention" / "cpu.cpp"),
            ],
            depends=[str(path.relative_to(ROOT)) for path in (ROOT / PLUGINS).rglob("*.h")],
        )
    ],
    cmdclass={"build_ext": BuildNativePlugins},
)
