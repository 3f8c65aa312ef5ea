"""The table of operators: ours, and those that installed packages bring.

A package names its own in the entry points ``slipstream.operators``, each as
``Name = "module:SPEC"``. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from slipstream.errors import BuildError
from slipstream.plugins.spec import DOMAIN, OperatorSpec

__all__ = ["DOMAIN", "GROUP", "OPERATORS", "OURS", "STANDARD_DOMAINS", "OperatorTable"]

GROUP = "slipstream.operators"
STANDARD_DOMAINS = ("", "com.microsoft")  # of ONNX and of ONNX Runtime: not in this table
OURS = {
    "Linear": "slipstream.plugins.linear:SPEC",
    "Embedding": "slipstream.plugins.linear:EMBEDDING_SPEC",
    "PagedAttention": "slipstream.plugins.paged_attention:SPEC",
    "GatedActivation": "slipstream.plugins.gated_mlp:SPEC",
    "FusedAddRMSNorm": "slipstream.plugins.rms_norm:SPEC",
    "RotaryAngles": "slipstream.plugins.rotary:SPEC",
}


class OperatorTable(Mapping[str, OperatorSpec]):
    """Specs by name; entries are ``module:attribute``."""

    def __init__(self, ours: Mapping[str, str], group: str) -> None:
        self._ours, self._group = dict(ours), group
        self._entries: dict[str, str] | None = None
        self._specs: dict[str, OperatorSpec] = {}

    def __getitem__(self, name: str) -> OperatorSpec:
        """The spec of an operator; KeyError for an unknown name, BuildError for an entry that is
        none."""
        if name not in self._specs:
            # Ours need no look at what is installed.
            entry = self._ours[name] if name in self._ours else self._all()[name]
            self._specs[name] = _load(name, entry)
        return self._specs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._ours or name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, str]:
        if self._entries is None:
            self._entries = _joined(self._ours, entry_points(group=self._group))
        return self._entries


def _joined(ours: Mapping[str, str], installed: Iterable[EntryPoint]) -> dict[str, str]:
    entries = dict(ours)
    for point in installed:
        known = entries.setdefault(point.name, point.value)
        if known != point.value:
            raise BuildError(
                f"two packages bring an operator {point.name}: {known} and {point.value}; "
                f"uninstall one of them"
            )
    return entries


def _load(name: str, entry: str) -> OperatorSpec:
    module, _, attribute = entry.partition(":")
    spec = getattr(import_module(module), attribute, None)
    if not isinstance(spec, OperatorSpec) or spec.name != name:
        raise BuildError(f"{entry}, installed as the operator {name}, is not its OperatorSpec")
    return spec


OPERATORS = OperatorTable(OURS, GROUP)
