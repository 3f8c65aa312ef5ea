from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from typing import cast

import pytest
from tests.runtime.kv_events.mirror import Mirror, random_traffic, shared_paths

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.radix_tree import RadixTree
from slipstream.runtime.kv_events.events import (
    BlockRemoved,
    BlockStored,
    EventLog,
    page_hash,
    root_hash,
)
from slipstream.runtime.testing import counting_engine

# Of tokens 1, 2, without a salt and with the salt "a", and of tokens 3, 4 after the first.
FIRST, SALTED, SECOND = 14942340086647654523, 7902686432140586236, 8271942021754873415


def observed() -> tuple[RadixTree, EventLog]:
    tree = RadixTree(page_size=2)
    tree.observer = log = EventLog(page_size=2)
    return tree, log


def test_a_path_is_one_event_and_a_branch_names_its_parent() -> None:
    tree, log = observed()
    first = tree.extend(tree.root, (1, 2), page=0)
    tree.extend(first, (3, 4), page=1)
    tree.extend(first, (3, 4), page=2)  # is there already
    tree.extend(first, (5, 6), page=3)

    stored = cast(list[BlockStored], log.take())
    assert [(e.block_hashes[0], e.parent_block_hash, e.token_ids) for e in stored] == [
        (FIRST, None, [1, 2, 3, 4]),
        (stored[1].block_hashes[0], FIRST, [5, 6]),
    ]
    assert stored[0].block_hashes == [FIRST, SECOND] and stored[0].block_size == 2
    assert not log.take()


def test_children_leave_before_their_parents() -> None:
    tree, log = observed()
    first = tree.extend(tree.root, (1, 2), page=0)
    second = tree.extend(first, (3, 4), page=1)
    tree.release(second)
    log.take()

    tree.forget(first)
    assert log.take() == [BlockRemoved([SECOND, FIRST])]


def test_pages_of_siblings_are_not_told() -> None:
    tree, log = observed()
    own = tree.extend(tree.root, (7, 1, 2), page=0)  # a namespace that is a number
    deep = tree.extend(own, (3, 4), page=1)
    tree.release(deep)
    tree.evict()
    assert not log.take()


def test_a_salt_is_told_once_and_changes_the_name() -> None:
    tree, log = observed()
    first = tree.extend(tree.root, ("a", 1, 2), page=0)
    tree.extend(first, (3, 4), page=1)
    (stored,) = cast(list[BlockStored], log.take())
    assert stored.extra_keys == [["a"], None]
    assert stored.block_hashes[0] == SALTED != FIRST


def test_names_are_the_same_in_another_process() -> None:
    program = (
        "from slipstream.runtime.kv_events.events import page_hash, root_hash\n"
        "first = page_hash(root_hash(''), [1, 2])\n"
        "names = first, page_hash(root_hash('a'), [1, 2]), page_hash(first, [3, 4])\n"
        "print(*(int.from_bytes(name, 'big') for name in names))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert [int(each) for each in done.stdout.split()] == [FIRST, SALTED, SECOND]
    assert page_hash(root_hash(""), [1, 2]) == FIRST.to_bytes(8, "big")


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_mirror_of_the_events_is_the_tree(runs_ahead: bool) -> None:
    loop = EngineLoop(counting_engine(24, runs_ahead=runs_ahead, max_seq_len=80))
    log = EventLog(page_size=4)
    loop.scheduler.kv.observe(log)
    random_traffic(loop, seed=0)

    mirror, events = Mirror(), log.take()
    mirror.apply([asdict(event) for event in events])
    assert mirror.paths == shared_paths(loop.scheduler.kv)
    salts = {keys[0][0] for each in events if (keys := getattr(each, "extra_keys", None))}
    assert salts == {"a", "b"}
    removed = [event for event in events if isinstance(event, BlockRemoved)]
    assert len(removed) > 20, "the cache was too large to lose anything"
