"""A real Triton Inference Server, from the wheel that NVIDIA publishes for pytriton.

Its Python backend was built before NumPy 2, so its models run in an environment of their own: this
one's packages, with an older NumPy before them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import slipstream

WHEEL = "nvidia-pytriton==0.7.0"
NUMPY = "numpy==1.26.4"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
START_SECONDS = 60


@dataclass(frozen=True)
class Installation:
    """Where the server and its Python are."""

    root: Path

    @property
    def server(self) -> Path:
        """The directory of bin, backends and caches."""
        return self.root / "pytriton" / "tritonserver"

    @property
    def environment(self) -> Path:
        """A virtual environment: this one's packages, and a NumPy that the server can read."""
        return self.root / f"python-{VERSION}"

    def variables(self, environment: Path) -> dict[str, str]:
        """Variables for a server whose models run in ``environment``."""
        libraries = [str(self.root / "nvidia_pytriton.libs")]
        if sysconfig.get_config_var("Py_ENABLE_SHARED"):
            libraries.insert(0, sysconfig.get_config_var("LIBDIR"))
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(libraries),
        }


def install() -> Installation:
    """Download and unpack the server into the user's cache, unless it is there; skips the test
    where the wheels cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = cache / "slipstream" / "triton" / f"{WHEEL.replace('==', '-')}-{VERSION}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            staged = Path(scratch) / "staged"
            _unpack(staged, Path(scratch))
            with contextlib.suppress(OSError):  # another worker was first
                staged.rename(root)
    installation = Installation(root)
    _link_packages(installation)
    return installation


def _unpack(staged: Path, scratch: Path) -> None:
    for requirement in (WHEEL, NUMPY):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
        command = [*pip, ":all:", "--dest", str(scratch), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip()[-200:]}")
    (server,) = scratch.glob("nvidia_pytriton*.whl")
    (numpy,) = scratch.glob("numpy*.whl")
    zipfile.ZipFile(server).extractall(staged)
    installation = Installation(staged)
    stub = installation.server / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"{WHEEL} has no Python backend for Python {VERSION}")
    shutil.copy(stub, installation.server / "backends" / "python")
    for program in ("bin/tritonserver", "backends/python/triton_python_backend_stub"):
        (installation.server / program).chmod(0o755)
    venv = [sys.executable, "-m", "venv", "--without-pip", str(installation.environment)]
    subprocess.run(venv, check=True)
    zipfile.ZipFile(numpy).extractall(_packages(installation))


def _packages(installation: Installation) -> Path:
    return installation.environment / "lib" / f"python{VERSION}" / "site-packages"


def _link_packages(installation: Installation) -> None:
    """Let the environment of the server find the package that is tested and this environment's
    packages, after its own."""
    packages, tested = sysconfig.get_path("purelib"), Path(slipstream.__file__).parents[1]
    lines = f"{tested}\nimport site; site.addsitedir({packages!r})\n"
    file = _packages(installation) / "host.pth"
    if not file.is_file() or file.read_text() != lines:
        file.write_text(lines)


@dataclass(frozen=True)
class Server:
    """A running server; all ports are of 127.0.0.1."""

    process: subprocess.Popen[bytes]
    repository: Path
    log_file: Path
    http: int
    grpc: int
    metrics: int

    @property
    def log(self) -> str:
        """What it has written."""
        return self.log_file.read_text(errors="replace")

    def metric_lines(self) -> list[str]:
        """Triton's metrics that are Slipstream's."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics") as response:
            text = response.read().decode()
        return [line for line in text.splitlines() if "slipstream:" in line]

    def metric(self, name: str, model: str, **labels: str) -> float:
        """The value of a metric of a model, summed over its instances and versions."""
        wanted = [f'{key}="{value}"' for key, value in {"model_name": model, **labels}.items()]
        values = [
            float(line.rpartition(" ")[2])
            for line in self.metric_lines()
            if line.startswith(f"slipstream:{name}{{") and all(label in line for label in wanted)
        ]
        assert values, f"there is no metric {name} of {model}"
        return sum(values)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Return when ``condition()`` is true; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def running_requests(server: Server) -> float:
    """Requests that "llama" computes."""
    return server.metric("num_requests_running", "llama")


def wait_until_idle(server: Server, seconds: float = 120) -> None:
    """Fail unless every request ends and every page comes back, in far less time than they run."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    wait_for(
        lambda: not any(server.metric(name, "llama") for name in names),
        "nothing runs, waits or holds a page",
        seconds,
    )


@contextlib.contextmanager
def running(
    installation: Installation, directory: Path, *, environment: Path | None = None
) -> Iterator[Server]:
    """A server of ``directory`` (models/ and backends/), where nothing is loaded yet."""
    python = directory / "backends" / "python"
    if not python.exists():
        python.symlink_to(installation.server / "backends" / "python")
    http, grpc, metrics = _free_ports(3)
    log_file = directory / f"triton-{http}.log"
    command = [str(installation.server / "bin" / "tritonserver")]
    command += [f"--model-repository={directory / 'models'}", "--model-control-mode=explicit"]
    command += [f"--backend-directory={directory / 'backends'}", "--exit-timeout-secs=5"]
    for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        command += [f"--{name}-port={port}", f"--{name}-address=127.0.0.1"]
    variables = installation.variables(environment or installation.environment)
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=variables, start_new_session=True
        )
    server = Server(process, directory, log_file, http, grpc, metrics)
    try:
        wait_for(lambda: _answers(server), "Triton is ready", START_SECONDS)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(server: Server) -> bool:
    assert server.process.poll() is None, server.log
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        urllib.request.urlopen(f"http://127.0.0.1:{server.http}/v2/health/live").close()
        return True
    return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
