"""The gated activation of a feed-forward layer."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

# How a gate g and an up u meet. The clamped one is that of gpt-oss.
GATES = {"silu": 0, "gelu_tanh": 1, "clamped": 2}
GATE = AttributeSpec(
    "gate",
    "int",
    "0 silu(g)·u; 1 gelu(g)·u, in the tanh form of GELU; 2 g·sigmoid(1.702·g)·(u + 1) of g ≤ 7 and "
    "-7 ≤ u ≤ 7",
    0,
    (0, 2),
)

SPEC = OperatorSpec(
    name="GatedActivation",
    doc="A gate on what it lets through: gates are the first half of the columns, ups the second.",
    inputs=(
        TensorSpec(
            "gate_up", ACTIVATION_DTYPES, ("tokens", "width"), "gate columns, then up columns"
        ),
    ),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "width//2"), "the gated values"),),
    attributes=(GATE,),
    reference="slipstream.plugins.gated_mlp.reference:gated_activation",
    cuda="slipstream.plugins.gated_mlp.cuda:bind",
)
