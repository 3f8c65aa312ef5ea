"""The process that compiles the kernels of an engine which another is building.

It reads what to compile from stdin, as ``engine_kernels.compile_aside`` writes it, and writes the
file of kernels to stdout; what it has to tell goes to stderr.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys

from slipstream.builder.build import plan
from slipstream.server.engine_kernels import compile_plan


def main() -> None:
    """Compile."""
    # Whatever a library prints is no kernel.
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(format="%(message)s")
    logging.getLogger("slipstream.phases").setLevel(logging.INFO)
    path, options, capability = pickle.load(sys.stdin.buffer)
    kernels = compile_plan(plan(path, options), capability)
    with os.fdopen(answer, "wb") as file:
        file.write(kernels)


if __name__ == "__main__":
    main()
