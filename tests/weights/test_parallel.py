"""Work that all cores share."""

from __future__ import annotations

import os
import threading

import pytest

from slipstream.weights import parallel
from slipstream.weights.parallel import in_parallel, row_chunks


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_cores", lambda: 4)
    parallel._pool.cache_clear()


def test_as_many_threads_work_as_there_are_cores() -> None:
    meeting = threading.Barrier(4, timeout=10)
    threads = set[str]()

    def work(part: int) -> None:
        meeting.wait()
        threads.add(threading.current_thread().name)

    in_parallel(work, range(4))
    assert len(threads) == 4 and threading.current_thread().name in threads


def test_parts_may_have_parts() -> None:
    done: list[tuple[int, int]] = []
    in_parallel(
        lambda outer: in_parallel(lambda inner: done.append((outer, inner)), range(20)), range(20)
    )
    assert sorted(done) == [(outer, inner) for outer in range(20) for inner in range(20)]


def test_an_error_ends_the_work_and_is_raised() -> None:
    """Whoever meets it: the caller's thread or another."""
    done: list[int] = []

    def work(part: int) -> None:
        done.append(part)
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part"):
        in_parallel(work, range(1000))
    assert len(done) <= 4


def test_a_forked_process_has_threads_of_its_own() -> None:
    in_parallel(id, range(8))
    child = os.fork()
    if child == 0:
        in_parallel(id, range(8))
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_chunks_of_rows_cover_a_matrix() -> None:
    assert list(row_chunks(5, 10, 25)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(row_chunks(2, 100, 25)) == [slice(0, 1), slice(1, 2)]
    assert list(row_chunks(0, 10, 25)) == [] and list(row_chunks(1, 0, 25)) == [slice(0, 1)]
