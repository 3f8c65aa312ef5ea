"""From the functions of a graph to plans: what each is made of, and who makes it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from slipstream.builder.engine import CONSTANT, PLANS, EngineLimits, Plans
from slipstream.builder.graph.program import IR_VERSION, dtype_name
from slipstream.builder.targets.tensorrt.layers import count_products, read_layers
from slipstream.cores import usable_cores
from slipstream.errors import BuildError, MissingDependencyError
from slipstream.plugins.cuda.detect import gpu_capability, sm
from slipstream.plugins.cuda.tensorrt import FLAVOURS, RTX_GPUS, module_of
from slipstream.plugins.operators import SEGMENTS

UNVERIFIED = (
    "its TensorRT plans were made and inspected without a GPU: that they load, what they compute "
    "and how fast was never seen on one"
)
_SCRIPT = Path(__file__).with_name("make_plan.py")
_LEAST_TOKENS = 16  # to which the executor pads the smallest step of more than decodes
_ABORTED = -6
_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True, slots=True)
class PlanSource:
    """A plan to be made: its file, the function, and a call whose weights it takes; ``constants``
    are the arguments that it holds itself."""

    file: str
    function: ir.Function
    call: ir.Node
    constants: tuple[int, ...]


def plan_sources(model: ir.Model) -> dict[str, PlanSource]:
    """What the plan of every call is made of, by the call's name: one for all calls of a function
    that holds no weights."""
    functions = {function.name: function for function in model.functions.values()}
    found = {}
    for call in model.graph:
        if call.domain != SEGMENTS:
            continue
        names = [value.name or "" for value in call.inputs if value is not None]
        constants = tuple(i for i, name in enumerate(names) if name.endswith(CONSTANT))
        stem = call.name if constants else call.op_type
        assert call.name is not None
        found[call.name] = PlanSource(f"{stem}.plan", functions[call.op_type], call, constants)
    return found


def flavour_here() -> str:
    """The flavour of TensorRT that makes plans on this machine.

    MissingDependencyError where none is installed, BuildError where it needs a GPU.
    """
    installed = [flavour for flavour in FLAVOURS if module_of(flavour) is not None]
    if not installed:
        raise MissingDependencyError(
            "target tensorrt makes plans with the package tensorrt-rtx, which is not installed; "
            "install it: pip install 'slipstream[tensorrt]'"
        )
    # A GPU of a data centre runs no plan of the other.
    if "tensorrt" in installed and gpu_capability() is not None:
        return "tensorrt"
    if "tensorrt_rtx" in installed:
        return "tensorrt_rtx"
    raise BuildError(
        "the package tensorrt makes plans only for a GPU that is there, and there is none; install "
        "tensorrt-rtx, which needs none: pip install 'slipstream[tensorrt]'"
    )


def make_plans(model: ir.Model, limits: EngineLimits, capability: str, directory: Path) -> Plans:
    """Write the plans of a graph whose weights lie in ``directory``, and ``plans.json``, which says
    what is in them.

    Raises BuildError for what TensorRT refuses, in its words.
    """
    flavour = flavour_here()
    gpus = _gpus(flavour, capability)
    sources = plan_sources(model)
    jobs = {source.file: source for source in sources.values()}

    def make(source: PlanSource) -> dict[str, Any]:
        return _make(source, limits, flavour, gpus if flavour == "tensorrt_rtx" else (), directory)

    with ThreadPoolExecutor(usable_cores()) as pool:
        reports = dict(zip(jobs, pool.map(make, jobs.values()), strict=True))
    described = {file: _described(jobs[file], report) for file, report in reports.items()}
    (directory / PLANS).write_text(json.dumps(described, indent=1) + "\n")
    return Plans(
        flavour=flavour,
        version=next(iter(reports.values()))["version"],
        gpus=tuple(f"sm_{gpu}" for gpu in gpus),
        calls={name: source.file for name, source in sources.items()},
        unverified=UNVERIFIED,
    )


def _gpus(flavour: str, capability: str) -> tuple[int, ...]:
    here = gpu_capability()
    if flavour == "tensorrt":
        assert here is not None
        return (int(sm(here).removeprefix("sm_")),)
    return tuple(gpu for gpu in RTX_GPUS if gpu >= int(capability.removeprefix("sm_")))


def write_model(source: PlanSource, file: Path) -> None:
    """A function as a model of its own, whose constants are data of the engine's weight file."""
    graph = source.function.graph.clone()
    formals = list(graph.inputs)
    for index in source.constants:
        actual, formal = source.call.inputs[index], formals[index]
        assert actual is not None and isinstance(actual.const_value, ir.ExternalTensor)
        data = actual.const_value
        formal.const_value = ir.ExternalTensor(
            data.location, data.offset, data.length, data.dtype,
            shape=data.shape, name=str(formal.name), base_dir=data.base_dir,
        )  # fmt: skip
        graph.inputs.remove(formal)
        graph.register_initializer(formal)
    ir.save(ir.Model(graph, ir_version=IR_VERSION), file)


def profiles(function: ir.Function, limits: EngineLimits) -> list[dict[str, Sequence[list[int]]]]:
    """The least and the greatest shape of every input: for decodes, then for every step; or of as
    many rows of logits as there are sequences."""
    shapes = {str(value.name): value.shape for value in function.inputs}
    named = {str(dim) for shape in shapes.values() for dim in shape or ()}
    decodes, tokens = limits.max_batch_size, max(limits.max_num_tokens, _LEAST_TOKENS)
    most = [decodes] if "T" not in named else [decodes, tokens]
    return [
        {
            name: [[dim if isinstance(dim, int) else n for dim in shape or ()] for n in (1, size)]
            for name, shape in shapes.items()
        }
        for size in dict.fromkeys(most)
    ]


def _make(
    source: PlanSource,
    limits: EngineLimits,
    flavour: str,
    gpus: Sequence[int],
    directory: Path,
) -> dict[str, Any]:
    model = directory / f".{source.file}.onnx"
    held = {str(source.function.inputs[index].name) for index in source.constants}
    shapes = [
        {name: ends for name, ends in profile.items() if name not in held}
        for profile in profiles(source.function, limits)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        job = {
            "module": module_of(flavour), "model": str(model), "gpus": list(gpus),
            "plan": str(directory / source.file), "report": str(report), "profiles": shapes,
        }  # fmt: skip
        try:
            write_model(source, model)
            found = _run(job, report, source.file)
        finally:
            model.unlink(missing_ok=True)
    _check(found, source, held)
    return found


def _run(job: Mapping[str, Any], report: Path, file: str) -> dict[str, Any]:
    command = [sys.executable, "-P", str(_SCRIPT)]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        aborted = "it aborted, as it does where a node is a plugin" * (done.returncode == _ABORTED)
        raise BuildError(
            f"TensorRT made no {file}: {aborted or last}; use another quantization, or --target "
            "cuda"
        )
    found: dict[str, Any] = json.loads(report.read_text())
    if "errors" in found:
        told = "; ".join(found["errors"]) or "it says nothing"
        raise BuildError(
            f"TensorRT made no {file}: {told:.500}; use another quantization, or --target cuda"
        )
    return found


def _check(report: Mapping[str, Any], source: PlanSource, held: set[str]) -> None:
    """BuildError unless the plan takes and gives what its calls do."""
    wanted = {
        "inputs": [value for value in source.function.inputs if value.name not in held],
        "outputs": list(source.function.outputs),
    }
    for which, values in wanted.items():
        told = {str(value.name): _signature(value) for value in values}
        made = {
            name: (_NAMES.get(port["dtype"].lower(), port["dtype"].lower()), port["shape"])
            for name, port in report[which].items()
        }
        if told != made:
            raise BuildError(
                f"TensorRT made a {source.file} with other {which} than {source.function.name} "
                f"has: {sorted(set(map(str, told.items())) ^ set(map(str, made.items())))}; use "
                "--target cuda"
            )
    if report["unread"]:
        raise BuildError(
            f"TensorRT made a {source.file} that ignores {', '.join(report['unread'])}; use "
            "--target cuda"
        )


def _signature(value: ir.Value) -> tuple[str, list[int]]:
    assert value.dtype is not None and value.shape is not None
    shape = [dim if isinstance(dim, int) else -1 for dim in value.shape]
    return dtype_name(value.dtype), shape


def _described(source: PlanSource, report: Mapping[str, Any]) -> dict[str, Any]:
    """What ``plans.json`` says of a plan."""
    layers = read_layers(report["table"])
    return {
        "function": source.function.name,
        "inputs": report["inputs"],
        "outputs": report["outputs"],
        "constants": [str(source.function.inputs[index].name) for index in source.constants],
        "products": count_products(layers),
        "layers": [f"{layer.kind} {layer.name}" for layer in layers],
    }
