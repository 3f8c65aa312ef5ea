"""Engines of several ranks whose matrices each rank makes on its own GPU: the files have room for
them and nothing in it, so that 70 GB of random weights take seconds.

``site`` is what followers are started with: its ``sitecustomize`` makes them do the same.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_models import matrices, random_blob, small_array
from torch import Tensor

from slipstream.builder import build as build_module
from slipstream.builder.build import Plan, write_engine
from slipstream.builder.engine import Engine
from slipstream.builder.graph.program import StoredWeight
from slipstream.builder.weight_file import ALIGNMENT
from slipstream.errors import EngineMismatchError
from slipstream.runtime.executors.cuda import load as load_module
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.weights import load_weights
from slipstream.weights.json import Origin
from slipstream.weights.safetensors import encode_header, read_header
from slipstream.weights.tensor import WeightFormat

_FORMATS = "SLIPSTREAM_HOLLOW_FORMATS"  # names the file of them
_SITE = """import sys
sys.path.insert(0, {here!r})
import gpu_hollow
gpu_hollow.make_on_gpus()
"""


def write_hollow_engine(plan: Plan, directory: Path, scratch: Path) -> None:
    """Write an engine without its matrices, and to ``scratch`` what is needed to make them; from
    now on this process, and those that it starts, make them when the engine is loaded."""
    formats = {matrix.name: matrix.format for matrix in matrices(plan)}
    with ExitStack() as stack:
        stack.enter_context(patch.object(build_module, "write_weights", _hollow(formats)))
        stack.enter_context(patch.object(build_module, "digest", lambda _: "hollow"))
        write_engine(plan, directory, "random", str(directory))
    file = scratch / "formats"
    file.write_bytes(pickle.dumps(formats))
    here = str(Path(__file__).parent)
    (scratch / "sitecustomize.py").write_text(_SITE.format(here=here))
    os.environ[_FORMATS] = str(file)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(scratch), os.environ.get("PYTHONPATH", "")])
    make_on_gpus()


def make_on_gpus() -> None:
    """Have this process make the matrices of engines that it loads, whose files nobody hashes."""
    if _FORMATS in os.environ:
        load_module.load_weights = _made  # type: ignore[attr-defined]
        Engine.verify_files = lambda *_: None  # type: ignore[method-assign]


def _hollow(
    formats: dict[str, WeightFormat],
) -> Callable[..., dict[str, tuple[int, int]]]:
    def write(
        path: Path, weights: Sequence[StoredWeight], progress: Callable[[int], None]
    ) -> dict[str, tuple[int, int]]:
        weights = sorted(weights, key=_alignment, reverse=True)
        specs = [part for weight in weights for part in weight.parts]
        header, places = encode_header(specs, {"format": "slipstream"}, ALIGNMENT)
        with path.open("wb") as file:
            file.write(header)
            for weight in weights:
                (part, *_) = weight.parts
                if part.name not in formats:
                    file.seek(places[part.name][0])
                    file.write(small_array(weight).tobytes())
            file.truncate(max(offset + size for offset, size in places.values()))
        return places

    return write


def _alignment(weight: StoredWeight) -> int:
    return min(math.gcd(part.nbytes, ALIGNMENT) for part in weight.parts)


def _made(file: Path, device: Device, names: Container[str] | None = None) -> dict[str, Tensor]:
    """What ``load_weights`` gives: the small arrays from the file, matrices of random numbers."""
    formats: dict[str, WeightFormat] = pickle.loads(Path(os.environ[_FORMATS]).read_bytes())
    stored = read_header(file, Origin(file, "write it again", EngineMismatchError))
    found = load_weights(file, device, [name for name in stored if name not in formats])
    torch.manual_seed(0)
    made: dict[WeightFormat, Tensor] = {}
    for name in stored:
        if name in formats:
            fmt = formats[name]
            if fmt not in made:
                made[fmt] = random_blob(fmt, str(device.torch))
            found[name] = made[fmt].clone()
    return found
