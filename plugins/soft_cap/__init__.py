"""Logits within a bound."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="SoftCap",
    doc="y = cap * tanh(x / cap).",
    inputs=(TensorSpec("x", ACTIVATION_DTYPES, ("rows", "columns"), "what a head makes"),),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("rows", "columns"), "logits within ±cap"),),
    attributes=(AttributeSpec("cap", "float", "the bound; positive"),),
    reference="slipstream.plugins.soft_cap.reference:soft_cap",
    cuda="slipstream.plugins.soft_cap.cuda:bind",
)
