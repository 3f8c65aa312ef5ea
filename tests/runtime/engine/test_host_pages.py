from __future__ import annotations

from slipstream.runtime.engine.host_pages import HostPage, HostPages, HostSpace
from slipstream.runtime.engine.page_hash import PRIVATE, node_hash, page_hash, root_hash
from slipstream.runtime.engine.radix_tree import RadixTree


def pages(slots: int) -> HostPages:
    return HostPages(HostSpace(slots))


def stored(host: HostPages, digest: bytes, parent: bytes = b"", windows: int = 0) -> HostPage:
    page = host.put(digest, parent, windows)
    assert page is not None
    host.land([page])
    return page


def test_the_least_recently_used_page_goes_first() -> None:
    host = pages(2)
    first, second = stored(host, b"a"), stored(host, b"b")
    assert host.put(b"a", b"", 0) is None, "it is here"
    third = stored(host, b"c")

    assert third.record.slot == second.record.slot
    assert (host.get(b"a"), host.get(b"b"), host.get(b"c")) == (first, None, third)
    host.check_invariants()


def test_a_held_page_keeps_its_slot() -> None:
    host = pages(2)
    held = [stored(host, b"a"), stored(host, b"b", b"a")]
    host.hold(held)
    assert host.put(b"c", b"", 0) is None
    host.let_go(held)
    stored(host, b"c")

    assert host.get(b"a") and not host.get(b"b"), "the end of a text goes first"
    host.check_invariants()


def test_what_a_step_stores_is_read_when_that_has_landed() -> None:
    host = pages(1)
    lost, again = host.put(b"a", b"", 0), host.put(b"b", b"", 0)
    assert lost and again and host.get(b"b") is None
    host.land([lost])
    assert host.get(b"a") is None and host.get(b"b") is None
    host.drop([lost])
    host.land([again])
    assert host.get(b"b") is again
    host.drop([again])
    assert host.get(b"b") is None
    host.check_invariants()


def test_a_page_with_more_parts_takes_the_place_of_one_with_fewer() -> None:
    host = pages(2)
    stored(host, b"a", windows=1)
    assert host.put(b"a", b"", 1) is None
    more = stored(host, b"a", windows=3)
    assert host.get(b"a") is more and len(host) == 1
    host.check_invariants()


def test_what_was_computed_from_a_forgotten_page_is_forgotten() -> None:
    host = pages(5)
    for digest, parent in ((b"a", b""), (b"b", b"a"), (b"d", b"c"), (b"e", b"b")):
        stored(host, digest, parent)
    host.forget([b"a", b"c"])
    assert len(host) == 0
    host.check_invariants()


def test_names_agree_between_processes() -> None:
    tree = RadixTree(2)
    key, other = tree.key([1, 2], 0, "me"), tree.key([1, 2], 0, 7)
    node = tree.extend(tree.extend(tree.root, key, 0), tree.key([1, 2, 3, 4], 1), 1)
    name = page_hash(page_hash(root_hash("me"), [1, 2]), [3, 4])

    assert node_hash(node, 2) == node.digest == name
    assert name.hex().startswith("d44800d11ece900a")
    assert page_hash(root_hash(""), [1, 2]) != page_hash(root_hash("me"), [1, 2])
    assert node_hash(tree.extend(tree.root, other, 2), 2) == PRIVATE
