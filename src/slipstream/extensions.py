"""What installed packages add to a table, by entry points.

A table says where the things that it names are declared: ``package.module``, which has an attribute
of the table's own name for it, or ``package.module:attribute``. A package that is not ours says the
same in its metadata, under the table's group. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from typing import Any

from slipstream.errors import BuildError


@cache
def entry_points(group: str) -> dict[str, str]:
    """The places that installed packages give, by name, in the order of the names.

    Raises BuildError for a name that two packages give to different places.
    """
    places: dict[str, str] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: point.name):
        known = places.setdefault(point.name, point.value)
        if known != point.value:
            raise BuildError(
                f"two packages bring {point.name} of {group}: {known} and {point.value}; "
                "uninstall one of them"
            )
    return places


def load(place: str, attribute: str, group: str) -> Any:  # noqa: ANN401 - what the table is of
    """The object at a place; ``attribute`` is its name where the place is a module.

    Raises BuildError, which names place and group, for one that cannot be imported, is not there or
    was declared in the way of another version.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name or attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise BuildError(
            f"{place} of {group} cannot be loaded ({error}); install its package again, or a "
            "version of it that is made for this Slipstream"
        ) from error
