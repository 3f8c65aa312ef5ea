"""A router's view of a prefix tree, made of events alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.runtime.engine.kv_cache import KVCacheManager
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams

# The salt of a prefix, and its tokens.
Prefix = tuple[str, tuple[int, ...]]
SALTS = ["", "", "", "a", "b"]


@dataclass(slots=True)
class Mirror:
    """What events as they are decoded from msgpack say of a tree; they must fit together."""

    prefixes: dict[int, Prefix] = field(default_factory=dict)
    clears: int = 0

    def apply(self, events: Sequence[Mapping[str, Any]]) -> None:
        for event in events:
            match event["type"]:
                case "BlockStored":
                    self._store(event)
                case "BlockRemoved":
                    for name in event["block_hashes"]:
                        del self.prefixes[name]
                case "AllBlocksCleared":
                    self.prefixes.clear()
                    self.clears += 1

    def _store(self, event: Mapping[str, Any]) -> None:
        names, size, parent = event["block_hashes"], event["block_size"], event["parent_block_hash"]
        assert len(event["token_ids"]) == len(names) * size
        keys = event["extra_keys"] or [None] * len(names)
        assert len(keys) == len(names) and not any(keys[1:])
        salt, before = self.prefixes[parent] if parent is not None else ("", ())
        salt = keys[0][0] if keys[0] else salt
        for index, name in enumerate(names):
            assert name not in self.prefixes
            before += tuple(event["token_ids"][index * size : (index + 1) * size])
            self.prefixes[name] = salt, before

    @property
    def paths(self) -> set[Prefix]:
        assert len(set(self.prefixes.values())) == len(self.prefixes), "two names of one prefix"
        return set(self.prefixes.values())


def shared_paths(kv: KVCacheManager) -> set[Prefix]:
    """What is in a tree, but for what siblings share among themselves."""
    found: set[Prefix] = set()
    for node in kv._tree.nodes():
        path = list(kv._tree.path(node))[::-1]
        tokens = [token for each in path for token in each.key[-kv.page_size :]]
        salt = path[0].key[0] if len(path[0].key) > kv.page_size else ""
        if isinstance(salt, str):
            found.add((salt, tuple(map(int, tokens))))
    return found


def random_traffic(loop: EngineLoop, seed: int, requests: int = 60) -> None:
    """Prompts with common beginnings, some with salts, siblings or an early end, until all have
    ended; more than the cache holds."""
    dice = random.Random(seed)
    stems = [[dice.randrange(8) for _ in range(40)] for _ in range(3)]
    for number in range(requests):
        stem = dice.choice(stems)[: dice.randrange(1, 40)]
        params = SamplingParams(
            temperature=1, seed=number, max_tokens=dice.randrange(1, 12), n=dice.choice([1, 1, 2])
        )
        prompt = [*stem, *(dice.randrange(8) for _ in range(dice.randrange(9)))]
        loop.add_request(Request(str(number), prompt, params, cache_namespace=dice.choice(SALTS)))
        if dice.random() < 0.2:
            loop.abort(str(dice.randrange(number + 1)))
        for _ in range(dice.randrange(4)):
            loop.step()
    while loop.has_work:
        loop.step()
