"""Costs of steps that are kept in the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.errors import EngineMismatchError
from slipstream.runtime.executors.cuda.costs import StepCosts

COSTS = StepCosts("NVIDIA H100", {1: 0.004, 16: 0.0044}, {(1, 3): 0.0004, (16, 7): 0.001})


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "step_costs.json"
    assert StepCosts.load(file, COSTS.device) is None
    file.write_bytes(COSTS.to_json())
    assert StepCosts.load(file, COSTS.device) == COSTS


def test_those_of_another_gpu_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_bytes(COSTS.to_json())
    assert StepCosts.load(tmp_path / "costs.json", "NVIDIA A100") is None


@pytest.mark.parametrize(
    "content",
    ['{"device": "a"}', '{"device": "a", "rows": [[1]], "guesses": []}', '{"device": "a", "rows": '
     '[[1, "x"]], "guesses": []}', "[]"],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(EngineMismatchError, match="tune the engine again"):
        StepCosts.load(tmp_path / "costs.json", "a")
