"""An engine ready to run: what the engine loop and its front ends are built from."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.builder.contract import CacheSpec, Pooling
from slipstream.builder.engine import Engine
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.base import Executor
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A device with weights on it, what that remembers of sequences, its tokenizer, its limits,
    and how it samples by default: for programs, and for people who talk with it directly; or what
    it makes in place of text.

    Where ``fingerprint`` is the same, so are the engine's files and the version of Slipstream.
    ``engine`` is the directory it came from, if any.
    """

    executor: Executor
    tokenizer: Tokenizer
    config: RuntimeConfig
    caches: tuple[CacheSpec, ...]
    vocab_size: int
    generation_defaults: SamplingParams
    interactive_defaults: SamplingParams
    fingerprint: str
    pooling: Pooling | None = None
    engine: Engine | None = None
