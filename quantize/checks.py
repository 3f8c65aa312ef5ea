"""What can be known of a quantization before anything is computed: who makes it, what it needs."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from slipstream.builder.checkpoints.quantized import create_layout
from slipstream.builder.checkpoints.quantized.layout import Layout
from slipstream.errors import BuildError, MissingDependencyError
from slipstream.quantize.options import SCHEMES, QuantizeOptions
from slipstream.quantize.plan import Plan

# Options that say which text is calibrated on.
_CALIBRATION = ("calib_dataset", "calib_size", "calib_max_seq_length", "seed")
_PACKAGES = {"modelopt": "nvidia-modelopt"}


def check_plan(plan: Plan) -> None:
    """BuildError or MissingDependencyError for what could only fail later."""
    options = plan.options
    layout = layout_of(plan)
    if options.auto_bits is not None and options.format == "awq":
        raise BuildError("AWQ's layout holds 4 bits alone; use another --format with --auto-bits")
    if options.kv_cache_dtype == "fp8" and not layout.holds_kv_scales:
        raise BuildError(
            f"a checkpoint in the layout {layout.name} has no place for the scales of an fp8 KV "
            "cache; use --format compressed-tensors or another --kv-cache-dtype"
        )
    _check_used(plan)
    _check_producer(plan)


def _check_used(plan: Plan) -> None:
    """BuildError for options that would be ignored."""
    options, defaults = plan.options, QuantizeOptions()
    used = [SCHEMES[scheme.name] for scheme in plan.schemes.values()]
    grouped = [scheme for scheme in used if scheme.grouping == "group" and not scheme.group]
    ignored = [] if plan.calibrated else list(_CALIBRATION)
    ignored += [] if grouped else ["group_size"]
    ours = [scheme for scheme in grouped if scheme.algorithm != "modelopt"]
    ignored += [] if ours else ["symmetric"]
    for name in ignored:
        if (value := getattr(options, name)) != getattr(defaults, name):
            raise BuildError(
                f"{name} is {value}, for which {options.qformat} has no use; leave it out, or use "
                "another --qformat such as int4_awq"
            )


def layout_of(plan: Plan) -> Layout:
    """The layout that holds what the plan makes."""
    formats = {
        f"{module}.weight": (scheme.weight_format(plan.shape(module)), None)
        for module, scheme in plan.schemes.items()
    }
    rounded = [module for module, scheme in plan.schemes.items() if scheme.float8_inputs]
    return create_layout(plan.options.format, formats, rounded)


def _check_producer(plan: Plan) -> None:
    """Errors for schemes that nobody makes together, and for packages that they need."""
    if not is_foreign(plan):
        return _check_installed("torch", "transformers")
    ours = [scheme.name for scheme in plan.schemes.values() if scheme.algorithm != "modelopt"]
    if ours:
        raise BuildError(
            f"{plan.options.qformat} and {ours[0]} cannot be mixed: one of them is made by "
            "nvidia-modelopt and the other is not; use overrides of one kind"
        )
    if plan.experts:
        raise BuildError(
            f"{plan.options.qformat} is made by nvidia-modelopt, whose files of experts are not "
            "read; use int4_awq, int4_gptq, int8_gptq, int8_sq, fp8 or fp8_block"
        )
    if plan.options.kv_cache_dtype == "fp8":
        raise BuildError(
            f"scales of an fp8 KV cache are not calibrated together with {plan.options.qformat}; "
            "leave --kv-cache-dtype at auto, or use fp8, fp8_block or int8_sq for the weights"
        )
    return _check_installed("torch", "transformers", "modelopt")


def is_foreign(plan: Plan) -> bool:
    """Whether nvidia-modelopt makes it."""
    return "modelopt" in plan.algorithms


def _check_installed(*modules: str) -> None:
    missing = next((module for module in modules if find_spec(module) is None), None)
    if missing:
        extra = "modelopt" if missing == "modelopt" else "quantize"
        raise MissingDependencyError(
            f"this needs {_PACKAGES.get(missing, missing)}, which is not installed; install it: "
            f"pip install 'slipstream[{extra}]'"
        )


def check_space(plan: Plan, output: Path) -> None:
    """BuildError where the result would not fit on the disk."""
    parent = next(path for path in output.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < plan.nbytes:
        raise BuildError(
            f"{output} would take {plan.nbytes >> 20} MiB and {parent} has {free >> 20} MiB free; "
            "make room or choose another -o"
        )
