from __future__ import annotations

from slipstream.runtime.engine.radix_tree import Node, RadixTree


def grow(tree: RadixTree, tokens: list[int], first_page: int) -> Node:
    """Insert ``tokens`` two a page, holding one reference to the path."""
    node = tree.match(tokens, len(tokens) // 2)
    tree.acquire(node)
    for start in range(node.depth * 2, len(tokens), 2):
        node = tree.extend(node, tuple(tokens[start : start + 2]), first_page + start // 2)
    return node


def pages(tree: RadixTree, node: Node) -> list[int]:
    return [step.page for step in tree.path(node)][::-1]


def test_match_finds_the_longest_full_page_prefix_within_the_limit() -> None:
    tree = RadixTree(page_size=2)
    grow(tree, [1, 2, 3, 4, 5, 6], first_page=10)

    assert pages(tree, tree.match([1, 2, 3, 4, 9, 9], 3)) == [10, 11]
    assert pages(tree, tree.match([1, 2, 3, 4, 5, 6], 1)) == [10]
    assert tree.match([2, 1, 3, 4], 2) is tree.root
    assert tree.match([1, 2, 3], 1).depth == 1


def test_prefixes_share_pages_and_branch_where_they_differ() -> None:
    tree = RadixTree(page_size=2)
    first = grow(tree, [1, 2, 3, 4], first_page=10)
    second = grow(tree, [1, 2, 7, 8], first_page=20)

    assert pages(tree, first) == [10, 11]
    assert pages(tree, second) == [10, 21]
    assert first.parent is second.parent and first.parent is not None
    assert first.parent.references == 2


def test_extend_returns_the_page_that_came_first() -> None:
    tree = RadixTree(page_size=2)
    first = tree.extend(tree.root, (1, 2), page=5)
    again = tree.extend(tree.root, (1, 2), page=6)

    assert again is first
    assert (again.page, again.references) == (5, 2)


def test_eviction_is_least_recently_used_and_takes_leaves_first() -> None:
    tree = RadixTree(page_size=2)
    old, new = grow(tree, [1, 2, 3, 4], 10), grow(tree, [5, 6], 20)
    tree.release(old)
    tree.release(new)

    again = tree.match([1, 2], 1)
    tree.acquire(again)
    tree.release(again)  # [1, 2] is now the youngest, its child still the oldest

    assert tree.num_idle == 3
    assert [tree.evict().page for _ in range(3)] == [11, 20, 10]
    assert not list(tree.nodes())


def test_a_referenced_path_is_never_idle() -> None:
    tree = RadixTree(page_size=2)
    deep = grow(tree, [1, 2, 3, 4, 5, 6], 10)
    held = tree.match([1, 2, 3, 4], 2)
    tree.acquire(held)
    tree.release(deep)

    assert tree.num_idle == 1
    assert tree.evict().page == 12
    tree.release(held)
    assert tree.num_idle == 2
