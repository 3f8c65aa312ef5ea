"""How the ranks of one group find each other's memory."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from slipstream.plugins.collectives.cuda.shared_memory import CountedAnew

# Exchanges of a process, by numbers as torch has them, through the stores that it finds by name.
_SECOND_GROUP = """
import sys
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from slipstream.plugins.collectives.cuda.shared_memory import exchanging
for number, path in enumerate(sys.argv[1:]):
    store = dist.FileStore(path, 1)
    dist.distributed_c10d._world.group_count = 7 + number
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    for exchange in range(2):
        name = exchanging(group)
        found = _resolve_process_group(name)
        assert (found.rank(), found.size(), name == group.group_name) == (0, 1, not number)
        found.get_group_store().set(f"Memory/{4 * number + exchange}/0", "there")
    ours = dist.distributed_c10d._get_process_group_store(group)
    assert ours.check(["Memory/0/0", "Memory/1/0"]), "what ranks find that count from 0"
    dist.destroy_process_group()
"""


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
            store.wait([other], timedelta(seconds=60))
            assert store.get(other) == bytes([0, 255, 1 - rank, exchange])


def test_a_second_group_of_a_process_exchanges_by_numbers_of_its_own(tmp_path: Path) -> None:
    """Not the first, whose ranks are of one age."""
    paths = [str(tmp_path / f"meeting{number}") for number in range(2)]
    done = subprocess.run(
        [sys.executable, "-c", _SECOND_GROUP, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
