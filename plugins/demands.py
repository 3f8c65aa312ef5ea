"""What a target needs of a machine beyond Slipstream and its own packages.

A target that needs nothing more is not in the table. A package adds its own by entry points of the
group, each the place of a ``Demands``; it may import nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from slipstream.extensions import entry_points, load

Deed = Literal["build", "run"]
_GROUP, _ATTRIBUTE = "slipstream.demands", "demands"
_DEMANDS = {
    "cpu": "slipstream.plugins.library:demands",
    "cuda": "slipstream.plugins.cuda.detect:demands",
    "tensorrt": "slipstream.plugins.cuda.tensorrt:demands",
}


class Demands(Protocol):
    """Says what this machine lacks to build engines of a target, or to run them."""

    def __call__(self, deed: Deed, *, thorough: bool) -> Sequence[str]:
        """A sentence for each lack, which names its remedy; none where nothing is missing.

        A ``thorough`` look may load what is installed, in processes of its own, and use devices.
        """
        ...


def lacks(target: str, deed: Deed, *, thorough: bool) -> Sequence[str]:
    """As ``Demands`` of a target; BuildError for an entry that cannot be loaded."""
    table = {**entry_points(_GROUP), **_DEMANDS}
    if target not in table:
        return ()
    demands: Demands = load(table[target], _ATTRIBUTE, _GROUP)
    return demands(deed, thorough=thorough)
