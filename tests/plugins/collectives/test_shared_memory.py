"""How the ranks of one group find each other's memory."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from slipstream.plugins.collectives.cuda.shared_memory import CountedAnew


def test_ranks_of_unlike_age_exchange_what_they_have(tmp_path: Path) -> None:
    """A process that has had another group before names its exchanges by other numbers."""
    files = [dist.FileStore(str(tmp_path / "meeting"), 2) for _ in range(2)]  # type: ignore[attr-defined]
    ours = [CountedAnew(file) for file in files]
    # Torch calls them from C++, as it does here.
    stores = [dist.PrefixStore("", store) for store in ours]  # type: ignore[attr-defined]
    for exchange in range(3):
        names = [f"memory/{exchange + 7 * rank}/" for rank in range(2)]
        for rank, store in enumerate(stores):
            value: Any = bytes([0, 255, rank, exchange])
            store.set(f"{names[rank]}{rank}", value)
        for rank, store in enumerate(stores):
            other = f"{names[rank]}{1 - rank}"
            store.wait([other], timedelta(seconds=5))
            assert store.get(other) == bytes([0, 255, 1 - rank, exchange])
