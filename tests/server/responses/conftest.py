"""A server of a model that counts, whose answers have thoughts and calls."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.server.openai.serving import Running, serving
from tests.server.responses.asking import Hearing

from slipstream.runtime.testing import counting_engine


@pytest.fixture(scope="module")
def dialect() -> Hearing:
    """Thoughts from ! to _, calls from c to h with a name up to e."""
    return Hearing("!_che")


@pytest.fixture(scope="module")
def server(dialect: Hearing) -> Iterator[Running]:
    """A server whose model has that dialect."""
    with serving(counting_engine(1100, max_seq_len=4096), max_stored_responses=3) as running:
        running.service.dialect = dialect
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with server.client() as client:
        yield client
