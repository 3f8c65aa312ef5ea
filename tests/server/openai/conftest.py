"""A server with the counting model, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.server.openai.serving import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with default options."""
    with serving() as running:
        yield running
