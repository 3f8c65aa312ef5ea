"""The table of operators in the ``slipstream`` domain."""

from slipstream.plugins import gated_mlp, linear, paged_attention, rms_norm, rotary
from slipstream.plugins.spec import OperatorSpec

DOMAIN = "slipstream"
OPERATORS: dict[str, OperatorSpec] = {
    spec.name: spec
    for spec in (
        linear.SPEC,
        linear.EMBEDDING_SPEC,
        paged_attention.SPEC,
        gated_mlp.SPEC,
        rms_norm.SPEC,
        rotary.SPEC,
    )
}
