"""The residual add and the RMS norm that follows it, as one operator."""

from slipstream.plugins.spec import AttributeSpec, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="FusedAddRMSNorm",
    doc="sum = x + residual; y = sum / sqrt(mean(sum²) + eps) * weight.",
    inputs=(
        TensorSpec("x", ("float32",), ("T", "H"), "output of the last sublayer"),
        TensorSpec("residual", ("float32",), ("T", "H"), "the residual stream"),
        TensorSpec("weight", ("float32",), ("H",), "norm weight"),
    ),
    outputs=(
        TensorSpec("y", ("float32",), ("T", "H"), "the normalized sum"),
        TensorSpec("sum", ("float32",), ("T", "H"), "the new residual stream"),
    ),
    attributes=(AttributeSpec("norm_eps", "float", "epsilon of the norm"),),
    reference="slipstream.plugins.rms_norm.reference:fused_add_rms_norm",
)
