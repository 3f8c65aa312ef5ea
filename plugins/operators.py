"""The table of operators: ours, and those that installed packages bring.

A package names its own in the entry points ``slipstream.operators``, each as
``Name = "module:SPEC"``. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from slipstream.errors import BuildError
from slipstream.extensions import entry_points, load
from slipstream.plugins.spec import DOMAIN, OperatorSpec

__all__ = [
    "DOMAIN",
    "GROUP",
    "LOOKED_UP",
    "OPERATORS",
    "OURS",
    "PRODUCTS",
    "SEGMENTS",
    "STANDARD_DOMAINS",
    "OperatorTable",
]

GROUP = "slipstream.operators"
# Functions that a graph has itself (``builder/targets/tensorrt/segments.py``).
SEGMENTS = "slipstream.segments"
# What the metadata of their calls say, as JSON: how many products there are of each kind, and of
# which arguments only some rows are read.
PRODUCTS, LOOKED_UP = "slipstream.products", "slipstream.looked_up"
# Not in this table: of ONNX, of ONNX Runtime, of a graph.
STANDARD_DOMAINS = ("", "com.microsoft", SEGMENTS)
OURS = {
    "Linear": "slipstream.plugins.linear:SPEC",
    "Embedding": "slipstream.plugins.linear:EMBEDDING_SPEC",
    "EmbeddingShard": "slipstream.plugins.linear:SHARD_SPEC",
    "PagedAttention": "slipstream.plugins.paged_attention:SPEC",
    "DrawTokens": "slipstream.plugins.draw_tokens:SPEC",
    "TopToken": "slipstream.plugins.top_token:SPEC",
    "Router": "slipstream.plugins.router:SPEC",
    "NormedRouter": "slipstream.plugins.normed_router:SPEC",
    "ExpertLinear": "slipstream.plugins.expert_linear:SPEC",
    "GatedActivation": "slipstream.plugins.gated_mlp:SPEC",
    "SoftCap": "slipstream.plugins.soft_cap:SPEC",
    "FusedAddRMSNorm": "slipstream.plugins.rms_norm:SPEC",
    "RotaryAngles": "slipstream.plugins.rotary:SPEC",
    "AllReduce": "slipstream.plugins.collectives:SPEC",
    "AllReduceAddRMSNorm": "slipstream.plugins.collectives:ADD_NORM_SPEC",
    "AllGather": "slipstream.plugins.collectives:GATHER_SPEC",
}


class OperatorTable(Mapping[str, OperatorSpec]):
    """Specs by name; entries are ``module:attribute``, those of ``group`` beside ours."""

    def __init__(self, ours: Mapping[str, str], group: str) -> None:
        self._ours, self._group = dict(ours), group

    def __getitem__(self, name: str) -> OperatorSpec:
        """The spec of an operator; KeyError for an unknown name, BuildError for an entry that is
        none."""
        # Ours need no look at what is installed.
        place = self._ours[name] if name in self._ours else self._all()[name]
        spec = load(place, "SPEC", self._group)
        if not isinstance(spec, OperatorSpec) or spec.name != name:
            raise BuildError(f"{place}, installed as the operator {name}, is not its OperatorSpec")
        return spec

    def __contains__(self, name: object) -> bool:
        return name in self._ours or name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, str]:
        installed = entry_points(self._group)
        for name in self._ours.keys() & installed.keys():
            raise BuildError(
                f"two packages bring an operator {name}: {self._ours[name]} and "
                f"{installed[name]}; uninstall one of them"
            )
        return self._ours | installed


OPERATORS = OperatorTable(OURS, GROUP)
