"""One server and one model for all tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.http as http_client
from tests.server.triton.harness import Server, install, running
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.server.triton.repository import Deployment, write_repository

# About a millisecond a step, and room for a request that lasts: what is to be cancelled is running.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "max_position_embeddings": 16384,
}


@pytest.fixture(scope="session")
def long_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that continues for up to 16384 tokens."""
    directory = tmp_path_factory.mktemp("triton-model")
    save_llama(directory / "checkpoint", llama_tensors(**SHAPE), **SHAPE)
    build(directory / "checkpoint", directory / "engine", BuildOptions())
    return directory / "engine"


@pytest.fixture(scope="session")
def triton(long_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose repository has the models "llama" and "ensemble", not yet loaded."""
    installation = install()
    directory = tmp_path_factory.mktemp("triton")
    options = {"max_batch_size": 40, "kv_cache_bytes": 256 << 20}
    write_repository(directory, long_engine, Deployment("llama", ensemble=True), options)
    with running(installation, directory) as server:
        yield server


@pytest.fixture(scope="module")
def admin(triton: Server) -> Iterator[http_client.InferenceServerClient]:
    """Triton's HTTP client; the model "llama" is loaded."""
    with http_client.InferenceServerClient(f"127.0.0.1:{triton.http}") as client:
        client.load_model("llama")
        yield client


@pytest.fixture(scope="module")
def server(triton: Server, admin: http_client.InferenceServerClient) -> Server:
    """The server, with the model loaded."""
    assert admin.is_model_ready("llama")
    return triton
