"""Compiles the operator's C++ kernel; ``pyproject.toml`` says the rest."""

import sys
from pathlib import Path

from setuptools import setup

from slipstream.plugins.build import BuildNative, NativeExtension, NativeWheel

sys.path.insert(0, str(Path(__file__).parent))
from slipstream_arcee.squared_relu import SPEC

setup(
    ext_modules=[
        NativeExtension("slipstream_arcee._cpu", [SPEC], ["slipstream_arcee/squared_relu/cpu"])
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
