"""Workers for prompts and for answers, behind Dynamo's own frontend and router."""

from __future__ import annotations

import http.client
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.server.dynamo.fleet import Fleet, Running, Stream, continued, running_fleet, wait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("dynamo") and find_spec("dynamo.frontend")), reason="needs ai-dynamo"
    ),
]
GIB = 64 / (1 << 30)  # the counting model's pages have a byte
PROMPT = "The quick brown fox jumps over the lazy abc"


class Pair:
    """A frontend, a worker that answers and one that computes prompts."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.pages = fleet.directory / "pages"
        self.pages.mkdir()
        self.decode = self.add("decode", serves=False)
        self.prefill = self.add("prefill")

    def add(self, mode: str, *, serves: bool = True) -> Running:
        options = ["--kv-transfer-gib", str(GIB), "--kv-transfer-path", str(self.pages)]
        return self.fleet.add(
            "--disaggregation-mode", mode, "--kv-transfer-timeout", "30", *options, serves=serves
        )

    @property
    def directory(self) -> Path:
        (found,) = self.pages.iterdir()
        return found

    @property
    def files(self) -> list[str]:
        return os.listdir(self.directory)

    def check_handed(self, prompt: str) -> None:
        """A prompt goes from one to the other, and is answered."""
        computed, lost = (
            steps(self.decode),
            self.decode.metric("slipstream:kv_transfers_lost_total"),
        )
        answer = self.fleet.ask(prompt, 5)
        assert answer["choices"][0]["text"] == continued(prompt, 5)
        # The last token of the prompt, and each that another one follows.
        wait(lambda: steps(self.decode) >= computed + 5)
        assert steps(self.decode) == computed + 5
        assert self.decode.metric("slipstream:kv_transfers_lost_total") == lost
        assert not self.files


def steps(worker: Running) -> float:
    """Tokens that all steps of a worker have computed."""
    return worker.metric("slipstream:iteration_tokens_total_sum")


def running(worker: Running) -> float:
    return worker.metric("slipstream:num_requests_running")


@contextmanager
def pair() -> Iterator[Pair]:
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as name, running_fleet(Path(name)) as fleet:
        yield Pair(fleet)


def test_one_worker_computes_the_prompt_and_another_answers() -> None:
    with pair() as workers:
        for first in "abc":
            workers.check_handed(first + PROMPT)
        sent, received = (w.metric("slipstream:kv_transfers_total") for w in (
            workers.prefill, workers.decode))  # fmt: skip
        assert sent == received == 3

        # A client that leaves while its prompt is computed.
        workers.prefill.hold()
        left = http.client.HTTPConnection(workers.fleet.url.removeprefix("http://"))
        body = json.dumps(workers.fleet.body("x" + PROMPT, 5))
        left.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait(lambda: running(workers.prefill) == 1)
        left.close()

        def gone() -> bool:
            workers.prefill.step()
            return running(workers.prefill) == 0

        wait(gone)
        workers.prefill.go_on()
        wait(lambda: not workers.files)
        workers.check_handed("y" + PROMPT)

        # Pages that are gone before they are taken: the prompt is computed again.
        answered = workers.decode.metric("slipstream:kv_transfers_lost_total")
        workers.decode.process.send_signal(signal.SIGSTOP)
        stream = Stream(workers.fleet, "z" + PROMPT, 5)
        wait(lambda: bool(workers.files))
        for name in workers.files:
            (workers.directory / name).unlink(missing_ok=True)
        workers.decode.process.send_signal(signal.SIGCONT)
        stream.check()
        assert workers.decode.metric("slipstream:kv_transfers_lost_total") == answered + 1

        # An end in order.
        workers.prefill.process.send_signal(signal.SIGTERM)
        wait(lambda: not workers.prefill.alive)
        assert workers.prefill.process.returncode == 0 and not workers.files


def test_a_worker_that_is_killed_on_the_way_costs_time_only() -> None:
    with pair() as workers:
        both = [workers.prefill, workers.add("prefill")]
        for worker in both:
            worker.hold()
        stream = Stream(workers.fleet, "b" + PROMPT, 8)
        wait(lambda: sum(map(running, both)) == 1)
        killed, workers.prefill = sorted(both, key=running, reverse=True)
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
        workers.prefill.go_on()
        stream.check()
        assert not workers.files
        workers.check_handed("c" + PROMPT)

        # One that answers: its streams go on elsewhere.
        other = workers.add("decode")
        for worker in (workers.decode, other):
            worker.hold()
        streams = [Stream(workers.fleet, letter + PROMPT, 20) for letter in "defg"]

        def enough() -> bool:
            for worker in (workers.decode, other):
                worker.step()
            return all(len(stream.text) >= 3 for stream in streams)

        wait(enough)
        killed, left = sorted((workers.decode, other), key=running, reverse=True)
        assert running(killed) >= 1
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
        left.go_on()
        for stream in streams:
            stream.check()
        wait(lambda: not workers.files)
