from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from slipstream.phases import phase, process_age


def test_a_phase_tells_its_name_and_times_even_if_it_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "slipstream.phases")
    with pytest.raises(KeyError), phase("outer"), phase("inner"):
        raise KeyError
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(" took ")[0] for line in told] == ["inner", "outer"]
    assert all(line.endswith(" s of the process") for line in told)


def test_nothing_is_told_unless_somebody_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "slipstream.phases")
    with phase("unheard"):
        pass
    assert not caplog.records


def test_the_age_of_a_process_counts_from_its_start() -> None:
    """Not from the import: what an interpreter did before is part of it."""
    code = "import time; time.sleep(0.3); from slipstream.phases import process_age"
    command = [sys.executable, "-c", f"{code}; print(process_age())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.3
    assert process_age() > 0
