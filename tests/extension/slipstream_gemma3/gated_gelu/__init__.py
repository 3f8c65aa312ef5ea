"""The gated activation of a GeGLU feed-forward layer."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="GatedGELU",
    doc="gelu(gate) * up, where gate is the first half of the columns and up the second.",
    inputs=(
        TensorSpec(
            "gate_up", ACTIVATION_DTYPES, ("tokens", "width"), "gate columns, then up columns"
        ),
    ),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "width//2"), "the gated values"),),
    attributes=(),
    reference="slipstream_gemma3.gated_gelu.reference:gated_gelu",
    native="slipstream_gemma3._cpu",
    cuda="slipstream_gemma3.gated_gelu.cuda:bind",
    domain="slipstream_gemma3",
)
