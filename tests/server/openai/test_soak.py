"""Half a minute of the traffic of ``benchmarks/soak.py``."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "soak.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_the_server_stands_it(smollm2_engine: Path) -> None:
    report = asyncio.run(script().run(str(smollm2_engine), minutes=0.5, seed=1))
    # Memory still settles in so short a time; the ten minutes of the script judge it.
    failures = [failure for failure in report.failures if not failure.startswith("memory")]
    assert not failures
    assert report.outcomes["stream 200"] and report.outcomes["unary left"]
    assert not any(report.gauges_at_end.values())
