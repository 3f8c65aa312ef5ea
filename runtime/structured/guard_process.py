"""The process of ``guard.Guard``: compiles what it is given and says how that went, line by line.

It is a program, and imports nothing of ours: it is to start fast and to be lost without harm.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

sys.path += sys.argv[1:]  # where the engine's process found it

from llguidance import (
    LLMatcher,
    LLParserLimits,
    LLTokenizer,
    TokenizerWrapper,
)

_MEMORY = 2 << 30
# A quarter of what a thread of the engine's process has, on which the same is compiled afterwards.
_STACK = 2 << 20


class _Bytes:
    """A vocabulary of bytes, and of the model's own special tokens, which grammars name."""

    bos_token_id = None

    def __init__(self, vocab_size: int, special: Mapping[int, str], eos: Sequence[int]) -> None:
        self.eos_token_id = eos[0] if eos else 0
        self.special_token_ids = [token for token in special if token < vocab_size]
        self.tokens = [b""] * max(vocab_size, len(special) + 257)
        for token in self.special_token_ids:
            self.tokens[token] = special[token].encode()
        free = (i for i in range(len(self.tokens)) if i not in special and i != self.eos_token_id)
        self._ids = [next(free) for _ in range(256)]
        for byte, token in enumerate(self._ids):
            self.tokens[token] = bytes([byte])

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._ids[byte] for byte in data]


def _serve() -> None:
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    special = {int(token): name for token, name in setup["special"].items()}
    vocabulary = _Bytes(setup["vocab_size"], special, setup["eos"])
    tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=setup["eos"] or None)
    limits = LLParserLimits(**setup["limits"])
    _reply("")
    for line in sys.stdin:
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits)
        if not matcher.is_error():
            _begin(matcher, vocabulary)
        _reply(matcher.get_error())


def _begin(matcher: LLMatcher, vocabulary: _Bytes) -> None:
    """Go on by one token: some fail only then, which is better known before the answer begins."""
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    mask &= ~(1 << vocabulary.eos_token_id)
    if mask and matcher.consume_token((mask & -mask).bit_length() - 1):
        matcher.compute_bitmask()


def _reply(error: str) -> None:
    sys.stdout.write(json.dumps(error) + "\n")
    sys.stdout.flush()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the engine's process, which ends this
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
