"""Reading tokenizer.json, which is found broken when an engine is built and not when it is run."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from slipstream.errors import CheckpointError

_MOST_BYTES = 1 << 28  # the largest, of 256,000 tokens with their merges, have 40 MB


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """The fast tokenizer of a file; CheckpointError for one that cannot be read."""
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size} bytes")
        return tokenizers.Tokenizer.from_file(str(file))
    # The Rust library raises nothing narrower; where it panics, not even an Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(
            f"{file} cannot be read as a tokenizer ({error!s:.200}); fetch it again, or update "
            f"`tokenizers` (installed: {tokenizers.__version__})"
        ) from error
