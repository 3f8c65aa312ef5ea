"""Builds the native CPU plugins: the kernels of our operators, in one shared library."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "src"))
from slipstream.plugins.build import BuildNative, NativeExtension, NativeWheel
from slipstream.plugins.operators import OPERATORS, OURS

LIBRARY = "slipstream.plugins._cpu"
operators = [OPERATORS[name] for name in OURS if OPERATORS[name].native == LIBRARY]
folders = sorted(path.parent for path in Path("src/slipstream/plugins").glob("*/cpu/kernel.cpp"))
setup(
    ext_modules=[NativeExtension(LIBRARY, operators, folders)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
