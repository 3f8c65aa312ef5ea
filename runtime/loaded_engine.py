"""An engine ready to run: what the engine loop and its front ends are built from."""

from __future__ import annotations

from dataclasses import dataclass, fields

from slipstream.builder.contract import CacheSpec, Pooling
from slipstream.builder.engine import Engine
from slipstream.errors import CapacityError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.base import Executor
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a front end knows of an engine, and may be told in another process: its tokenizer, its
    limits, and how it samples by default: for programs, and for people who talk with it directly;
    or what it makes in place of text.

    Where ``fingerprint`` is the same, so are the engine's files and the version of Slipstream.
    ``engine`` is the directory it came from, if any.
    """

    tokenizer: Tokenizer
    config: RuntimeConfig
    vocab_size: int
    generation_defaults: SamplingParams
    interactive_defaults: SamplingParams
    fingerprint: str
    pooling: Pooling | None = None
    engine: Engine | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine(Model):
    """The same with a device that has the weights on it, and what that remembers of sequences."""

    executor: Executor
    caches: tuple[CacheSpec, ...]

    @property
    def model(self) -> Model:
        """The engine without its device."""
        return Model(**{each.name: getattr(self, each.name) for each in fields(Model)})

    def reserve_pages(self) -> int:
        """How many KV pages the device has made room for; CapacityError where not one fits."""
        pages = self.executor.reserve_kv(self.config.kv_cache_bytes)
        if pages < 1:
            raise CapacityError(
                f"kv_cache_bytes {self.config.kv_cache_bytes} holds no KV page. Raise it"
            )
        return pages
