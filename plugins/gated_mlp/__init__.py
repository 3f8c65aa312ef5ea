"""The gated activation of a SwiGLU feed-forward layer."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="GatedActivation",
    doc="silu(gate) * up, where gate is the first half of the columns and up the second.",
    inputs=(
        TensorSpec(
            "gate_up", ACTIVATION_DTYPES, ("tokens", "width"), "gate columns, then up columns"
        ),
    ),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "width//2"), "the gated values"),),
    attributes=(),
    reference="slipstream.plugins.gated_mlp.reference:gated_activation",
    cuda="slipstream.plugins.gated_mlp.cuda:bind",
)
