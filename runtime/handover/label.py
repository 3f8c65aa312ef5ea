"""Whose pages are handed over: those of which engine, of which prompt, and how they lie."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from hashlib import sha256

from slipstream.runtime.engine.page_hash import root_hash
from slipstream.runtime.handover.staging import Staging
from slipstream.runtime.handover.transport import LostHandover

_MAGIC = b"slipstream-kvt-1"
_LABEL = struct.Struct("<16s32s32sQ")  # magic, engine, prompt, tokens
SIZE = _LABEL.size


class Labels:
    """Makes the labels of one engine.

    Engines whose ``fingerprint`` is the same have the same files and version, and so the same
    numbers in their pages; sizes are told beside it for devices that lay them out by themselves.
    """

    def __init__(self, staging: Staging, fingerprint: str) -> None:
        sizes = [staging.page_size, *(part.shape[1] for part in staging.parts)]
        self._engine = sha256(f"{fingerprint} {sizes}".encode()).digest()

    def of(self, tokens: Sequence[int], namespace: str) -> bytes:
        """That of the pages of all ``tokens``, which callers of a ``namespace`` share."""
        prompt = sha256(root_hash(namespace) + array("q", tokens).tobytes()).digest()
        return _LABEL.pack(_MAGIC, self._engine, prompt, len(tokens))


def check_label(found: bytes, expected: bytes) -> None:
    """Raise ``LostHandover`` unless they are the same."""
    if found != expected:
        same = len(found) == SIZE and found[:48] == expected[:48]
        raise LostHandover("prompt" if same else "engine")
