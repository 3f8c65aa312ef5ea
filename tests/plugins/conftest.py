"""What tests of several operators share."""

from __future__ import annotations

import pytest

from slipstream.plugins import library


@pytest.fixture(params=library.isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this machine runs."""
    return str(request.param)
