"""What is kept of answers, and for how long."""

from __future__ import annotations

from slipstream.server.responses.store import Store, Stored


def stored(size: int) -> Stored:
    return Stored(b"x" * size, [])


def test_what_was_not_asked_for_the_longest_makes_room() -> None:
    store = Store(max_entries=2, max_bytes=10_000)
    store.put("a", stored(1))
    store.put("b", stored(1))
    assert store.get("a") is not None
    store.put("c", stored(1))
    assert store.get("b") is None and store.get("a") and store.get("c")


def test_bytes_are_bounded_and_counted_with_the_conversation() -> None:
    store = Store(max_entries=10, max_bytes=5000)
    store.put("a", Stored(b"", [{"role": "user", "content": "x" * 2500}]))
    store.put("b", stored(2600))
    assert store.get("a") is None and store.get("b") is not None
    store.put("c", stored(6000))
    assert store.get("c") is None and store.get("b") is not None


def test_what_is_forgotten_frees_its_bytes() -> None:
    store = Store(max_entries=10, max_bytes=5000)
    store.put("a", stored(4000))
    assert store.pop("a") and not store.pop("a")
    store.put("b", stored(2000))
    store.put("c", stored(2000))
    assert store.get("b") and store.get("c")


def test_a_store_of_nothing_keeps_nothing() -> None:
    store = Store(max_entries=0, max_bytes=5000)
    store.put("a", stored(1))
    assert store.get("a") is None
