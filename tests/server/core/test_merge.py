from __future__ import annotations

import asyncio
from typing import Any

import pytest

from slipstream.server.core.merge import merge


def test_merged_generators_end_together() -> None:
    ended = []

    async def count(name: str, to: int, fail: bool = False) -> Any:  # noqa: ANN401
        try:
            for number in range(to):
                await asyncio.sleep(0)
                yield name, number
            if fail:
                raise ValueError(name)
        finally:
            ended.append(name)

    async def main() -> None:
        items = [item async for item in merge([count("a", 3), count("b", 2)])]
        assert sorted(items) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
        with pytest.raises(ValueError, match="c"):
            async for _ in merge([count("c", 1, fail=True), count("d", 10**9)]):
                pass
        left = merge([count("e", 10**9), count("f", 10**9)])
        await anext(left)
        await left.aclose()

    asyncio.run(main())
    assert sorted(ended) == ["a", "b", "c", "d", "e", "f"]
