"""The residual add and the RMS norm that follows it, as one operator."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="FusedAddRMSNorm",
    doc="sum = x + residual; y = sum / sqrt(mean(sum²) + eps) * weight.",
    inputs=(
        TensorSpec("x", ACTIVATION_DTYPES, ("tokens", "hidden"), "output of the last sublayer"),
        TensorSpec("residual", ACTIVATION_DTYPES, ("tokens", "hidden"), "the residual stream"),
        TensorSpec("weight", ACTIVATION_DTYPES, ("hidden",), "norm weight"),
    ),
    outputs=(
        TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "hidden"), "the normalized sum"),
        TensorSpec("sum", ACTIVATION_DTYPES, ("tokens", "hidden"), "the new residual stream"),
    ),
    attributes=(AttributeSpec("norm_eps", "float", "epsilon of the norm"),),
    reference="slipstream.plugins.rms_norm.reference:fused_add_rms_norm",
    cuda="slipstream.plugins.rms_norm.cuda:bind",
)
