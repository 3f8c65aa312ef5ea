from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.runtime.engine.health import MAX_FAILURES
from slipstream.server.cli import slipstream
from slipstream.server.commands.serve import default_name

ROOT = Path(__file__).parents[3]
_URL = re.compile(r"\burl=(http://\S+)")
_ON_A_DEVICE = """
from tests.server.devices import {device}, engine_on
import slipstream.server.commands.serve as module
from slipstream.server.cli import main
module.load_model = lambda model, runtime: engine_on({device}(), **runtime)
main()
"""


def _started(child: subprocess.Popen[str]) -> tuple[str, str]:
    """The URL of a server, and its log so far."""
    assert child.stderr is not None
    log = ""
    while (url := _URL.search(log)) is None:
        line = child.stderr.readline()
        assert line, log
        log += line
    return url[1], log


def test_a_server_from_the_command_line(tiny_engine: Path) -> None:
    command = [sys.executable, "-m", "slipstream.server.cli", "serve", str(tiny_engine)]
    options = ["--port", "0", "--served-model-name", "tiny", "--served-model-name", "same"]
    with subprocess.Popen(
        [*command, *options, "--max-batch-size", "4"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLIPSTREAM_API_KEY": "one two"},
    ) as child:
        assert child.stderr is not None
        try:
            url, log = _started(child)
            for key, status in (("two", 200), ("three", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                body = {"model": "same", "prompt": "the fox", "max_tokens": 3}
                answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
                assert answer.status_code == status, answer.text
            assert "text/html" in httpx.get(url, timeout=60).headers["content-type"]
        finally:
            child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0
        log += child.stderr.read()
    assert " serving model=" in log and " stopped" in log
    assert len(re.findall(r" request .*path=/v1/completions status=(?:200|401)", log)) == 2


@pytest.mark.parametrize(
    ("device", "options", "requests", "reason"),
    [
        ("BrokenDevice", (), MAX_FAILURES, f"the device failed {MAX_FAILURES} steps in a row"),
        ("PanickingDevice", (), 1, "the engine loop stopped: BaseException"),
        # Its engine's thread never comes back.
        ("GatedDevice", ("--step-timeout", "0.2"), 1, "the device has not answered"),
        pytest.param(
            *("HungGPU", ("--step-timeout", "2"), 1, "the device has not answered"),
            marks=pytest.mark.gpu,
        ),
    ],
)
def test_an_unhealthy_engine_ends_the_server_with_a_status_of_its_own(
    device: str, options: Sequence[str], requests: int, reason: str
) -> None:
    program = _ON_A_DEVICE.format(device=device)
    # In one process: the path of an engine would be opened to know how many there are to be.
    serve = ["serve", "engine", "--port", "0", "--api-processes", "0"]
    command = [sys.executable, "-c", program, *serve, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            url, log = _started(child)
            for _ in range(requests):
                body = {"prompt": "a", "stream": True}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                assert answer.status_code == 503, answer.text
            assert child.wait(120) == 70
        finally:
            child.kill()
        assert child.stderr is not None
        log += child.stderr.read()
    for words in (" serving ", f' unhealthy reason="{reason}', " draining ", " stopped"):
        assert words in log


def test_a_lost_rank_ends_the_server_and_the_other_ranks(tmp_path: Path) -> None:
    """With the status of an engine that does not work any more; nobody has asked for anything."""
    save_llama(tmp_path / "model", llama_tensors())
    build(tmp_path / "model", tmp_path / "engine", BuildOptions("cpu", tp_size=2))
    command = [sys.executable, "-m", "slipstream.server.cli", "serve", str(tmp_path / "engine")]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as child:
        try:
            _started(child)
            tasks = Path(f"/proc/{child.pid}/task").glob("*/children")
            ranks = [int(rank) for task in tasks for rank in task.read_text().split()]
            assert len(ranks) == 2
            os.kill(ranks[0], signal.SIGKILL)
            assert child.wait(120) == 70
        finally:
            child.kill()
        assert child.stderr is not None
        log = child.stderr.read()
    assert re.search("rank [01] of 2 was killed by signal 9", log)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_an_address_in_use_is_one_error_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(slipstream, ["serve", "no-such-model", "--port", port])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: cannot listen on 127.0.0.1 port {port}: Address")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "port is 70000; it must be at most 65535"),
        (["--max-queued-requests", "-1"], "max_queued_requests is -1; it must be at least 0"),
        (["--api-processes", "some"], "'some' is neither auto nor a number"),
        (["--api-processes", "65"], "api_processes is 65; it must be from 0 to 64"),
        (["--drain-timeout", "-1"], "drain_timeout is -1.0; it must be at least 0"),
        (["--api-key", ""], "api_key is empty"),
        (["--log-format", "xml"], "'xml' is not one of"),
    ],
)
def test_bad_options_are_bad_usage(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(slipstream, ["serve", "engine", *arguments])
    assert result.exit_code == 2 and words in result.stderr


def test_a_model_is_named_after_its_path_or_hub_id(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    assert default_name(str(tmp_path / "engine")) == "engine"
    assert default_name(f"{tmp_path}/engine/.") == "engine"
    assert default_name("org/model") == "org/model"
