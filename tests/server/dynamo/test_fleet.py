"""Against Dynamo's own frontend and router, on this machine's processors."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from tests.server.dynamo.fleet import Fleet, Running, Stream, running_fleet, wait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("dynamo") and find_spec("dynamo.frontend")), reason="needs ai-dynamo"
    ),
]
PAGES = "The quick brown fox jumps over the lazy"  # of four tokens, one a character


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as name, running_fleet(Path(name)) as made:
        yield made


def test_a_worker_whose_device_is_broken_ends_with_status_70() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name, running_fleet(Path(name)) as fleet:
        worker = fleet.add(device="BrokenDevice()")

        def ended() -> bool:
            with suppress(AssertionError, httpx.HTTPError):  # every step fails
                fleet.ask("abc")
            return not worker.alive

        wait(ended)
        assert worker.process.returncode == 70


def test_what_a_draining_worker_has_no_time_for_goes_on_elsewhere() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name, running_fleet(Path(name)) as fleet:
        ending = fleet.add("--drain-timeout", "0")
        ending.hold()
        stream = Stream(fleet, "moving a", 40)
        advance([ending], [stream], 3)
        other = fleet.add()
        ending.process.send_signal(signal.SIGTERM)

        def moved() -> bool:
            ending.step()  # the one that its device is in must end
            return other.prompts > 0

        wait(moved)
        ending.go_on()
        stream.check()
        wait(lambda: not ending.alive)
        assert ending.process.returncode == 0


def served_by(fleet: Fleet, workers: list[Running], prompt: str) -> tuple[Running, int]:
    """Who answered a prompt, and how many of its tokens were in the cache."""
    before = [worker.prompts for worker in workers]
    usage = fleet.ask(prompt)["usage"]
    wait(lambda: sum(worker.prompts for worker in workers) > sum(before))
    (by,) = (w for w, count in zip(workers, before, strict=True) if w.prompts > count)
    return by, (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def advance(workers: list[Running], streams: list[Stream], count: int) -> None:
    """Let held workers step until every stream has so many characters, and no end."""

    def enough() -> bool:
        for worker in workers:
            worker.step()
        return all(len(stream.text) >= count for stream in streams)

    wait(enough)
    assert not any(stream.over for stream in streams)


def busiest_first(workers: list[Running]) -> list[Running]:
    """By how many requests they run now."""

    def running(worker: Running) -> float:
        return worker.metric("slipstream:num_requests_running")

    return sorted(workers, key=running, reverse=True)


def test_a_shared_prefix_goes_to_the_worker_that_has_it(fleet: Fleet) -> None:
    workers = fleet.of(2)
    for worker in workers:
        worker.hold()
    prefixes = ["a" + PAGES, "b" + PAGES]
    streams = [Stream(fleet, prefix + "v", 8) for prefix in prefixes]
    advance(workers, streams, 1)
    assert [worker.metric("slipstream:num_requests_running") for worker in workers] == [1, 1]
    for worker in workers:
        worker.go_on()
    for stream in streams:
        stream.check()

    owners = []
    for prefix in prefixes:
        while (found := served_by(fleet, workers, prefix + "w"))[1] < len(prefix) // 4 * 4:
            pass  # until the router has heard of it
        owners.append(found[0])
    assert owners[0] is not owners[1]
    for number in range(8):
        prefix, owner = prefixes[number % 2], owners[number % 2]
        by, cached = served_by(fleet, workers, f"{prefix}x{number}")
        assert by is owner and cached == len(prefix) // 4 * 4


def test_a_client_that_leaves_ends_its_request(fleet: Fleet) -> None:
    workers = fleet.of(2)
    for worker in workers:
        worker.hold()
    stream = Stream(fleet, "leaving a", 200)
    advance(workers, [stream], 2)
    assert sum(w.metric("slipstream:num_requests_running") for w in workers) == 1
    stream.leave()

    def gone() -> bool:
        for worker in workers:
            worker.step()
        return sum(w.metric("slipstream:num_requests_running") for w in workers) == 0

    wait(gone)
    assert len(stream.text) < 150
    for worker in workers:
        worker.go_on()


def test_no_stream_is_lost_with_a_worker_that_is_killed(fleet: Fleet) -> None:
    workers = fleet.of(2)
    for worker in workers:
        worker.hold()
    streams = [Stream(fleet, f"stream {letter}", 40) for letter in "abcdef"]
    advance(workers, streams, 3)
    killed, left = busiest_first(workers)
    moved = killed.metric("slipstream:num_requests_running")
    assert moved >= 1

    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    left.go_on()
    for stream in streams:
        stream.check()
    # What had begun elsewhere came as a prompt.
    assert left.metric("slipstream:request_success_total") >= len(streams)


def test_a_worker_that_is_added_under_load_gets_traffic(fleet: Fleet) -> None:
    workers = [*fleet.of(1)]
    for worker in workers:
        worker.hold()
    held = [Stream(fleet, f"held {letter}", 40) for letter in "abcd"]
    advance(workers, held, 1)
    added = fleet.add()
    more = [Stream(fleet, f"more {letter}", 8) for letter in "ghijklmn"]
    wait(lambda: added.metric("slipstream:request_success_total") >= 1)
    for worker in workers:
        worker.go_on()
    for stream in [*held, *more]:
        stream.check()


def test_sigterm_lets_running_requests_end(fleet: Fleet) -> None:
    workers = fleet.of(2)
    for worker in workers:
        worker.hold()
    streams = [Stream(fleet, f"draining {letter}", 40) for letter in "ab"]
    advance(workers, streams, 3)
    ending, other = busiest_first(workers)
    prompts = other.prompts

    known = len(fleet.instances())
    ending.process.send_signal(signal.SIGTERM)
    wait(lambda: len(fleet.instances()) < known)
    other.go_on()
    fleet.ask("new a", 5)  # goes to the other
    with pytest.raises(AssertionError, match="not within"):
        wait(lambda: not ending.alive, seconds=3)  # beyond the grace period
    ending.go_on()
    for stream in streams:
        stream.check()
    wait(lambda: not ending.alive)
    assert ending.process.returncode == 0
    # What ran on it was not begun again, with what had been said until then as a prompt.
    assert other.prompts == prompts + len("new a")
