"""Builds the native CPU plugins: every ``plugins/*/cpu.cpp`` once per instruction set, one shared
library."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PLUGINS = Path("plugins")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
X86_ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", *AVX2],
    "avx2": AVX2,
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
    """Compiles the kernels per instruction set; cpu/kernels.cpp chooses at run time."""

    def build_extension(self, ext: Extension) -> None:
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        (temp / "operators.h").write_text(self._generated_header())
        isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
        include = [str(temp), str(PLUGINS)]
        kernels = [source for source in ext.sources if Path(source).name == "cpu.cpp"]
        others = [source for source in ext.sources if source not in kernels]
        objects = self.compiler.compile(
            others,
            output_dir=str(temp),
            include_dirs=include,
            extra_postargs=FLAGS,
            depends=ext.depends,
        )
        for isa, flags in isas.items():
            objects += self.compiler.compile(
                kernels,
                output_dir=str(temp / isa),
                macros=[("SLIPSTREAM_ISA", isa)],
                include_dirs=include,
                extra_postargs=FLAGS + flags,
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


sources = [str(path.relative_to(ROOT)) for path in (ROOT / PLUGINS).rglob("*.cpp")]
headers = [str(path.relative_to(ROOT)) for path in (ROOT / PLUGINS).rglob("*.h")]
setup(
    ext_modules=[Extension("slipstream.plugins._cpu", sources=sorted(sources), depends=headers)],
    cmdclass={"build_ext": BuildNativePlugins},
)
