"""Builds the native library with sanitizers around ``fuzz.cpp`` and runs that: ``fuzz.py TURNS``,
each of which calls every operator once, and ``SEED`` after that for the same calls again.

A standalone program: no sanitizer has to get on with an interpreter that knows nothing of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slipstream.plugins import cpu
from slipstream.plugins.build import KERNEL, BuildNative
from slipstream.plugins.cpu.codegen import generate, generate_signatures
from slipstream.plugins.operators import OPERATORS, OURS

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "fuzz"
PLUGINS = Path(cpu.__path__[0]).parent
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-Wall", "-Wextra"),
    *("-Wno-maybe-uninitialized", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]


def main(*arguments: str) -> int:
    """Compile what is new and run the program; its exit status."""
    program = build()
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([program, *arguments], env=environment, check=False).returncode


def build() -> Path:
    """The program, compiled on all cores."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    operators = [OPERATORS[name] for name in OURS if OPERATORS[name].native]
    (FOLDER / "operators.h").write_text(generate(operators))
    (FOLDER / "signatures.h").write_text(generate_signatures(operators))
    kernels = sorted(PLUGINS.glob(f"*/cpu/{KERNEL}"))
    sources = [*sorted(PLUGINS.glob("cpu/*.cpp")), *sorted(PLUGINS.glob("*/cpu/*.cpp"))]
    others = [source for source in sources if source.name != KERNEL]
    jobs: list[tuple[list[str], str, Path]]
    jobs = [([], "common", source) for source in (*others, Path(__file__).with_suffix(".cpp"))]
    for isa, flags in BuildNative.instruction_sets().items():
        jobs += [([*flags, f"-DSLIPSTREAM_ISA={isa}"], isa, source) for source in kernels]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    program = FOLDER / "fuzz"
    _run([*FLAGS, *map(str, objects), "-o", str(program), "-pthread"])
    return program


def _compile(flags: list[str], kind: str, source: Path) -> Path:
    target = FOLDER / f"{kind}-{source.parent.parent.name}-{source.stem}.o"
    includes = [f"-I{FOLDER}", f"-I{PLUGINS}"]
    _run([*FLAGS, *flags, *includes, "-c", str(source), "-o", str(target)])
    return target


def _run(arguments: list[str]) -> None:
    subprocess.run([os.environ.get("CXX", "c++"), *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
