"""The activation of a feed-forward layer without a gate."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="SquaredRelu",
    doc="y = max(x, 0)².",
    inputs=(TensorSpec("x", ACTIVATION_DTYPES, ("tokens", "width"), "what up_proj makes"),),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "width"), "its squares"),),
    attributes=(),
    reference="slipstream_arcee.squared_relu.reference:squared_relu",
    native="slipstream_arcee._cpu",
    cuda="slipstream_arcee.squared_relu.cuda:bind",
    domain="slipstream_arcee",
)
