"""The angles of the rotary embedding, once a step for all layers."""

from slipstream.plugins.spec import AttributeSpec, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="RotaryAngles",
    doc="cos = factor * cos(position * inv_freq), sin likewise: how PagedAttention turns heads.",
    inputs=(
        TensorSpec(
            "positions", ("int32",), ("tokens",), "place of each token in its sequence, from 0"
        ),
        TensorSpec(
            "inv_freq",
            ("float32",),
            ("rotary_half",),
            "radians a token, of half the rotated width",
        ),
    ),
    outputs=(
        TensorSpec("cos", ("float32",), ("tokens", "rotary_half"), "scaled cosines"),
        TensorSpec("sin", ("float32",), ("tokens", "rotary_half"), "scaled sines"),
    ),
    attributes=(AttributeSpec("factor", "float", "scales both, as YaRN does", 1.0),),
    reference="slipstream.plugins.rotary.reference:rotary_angles",
    cuda="slipstream.plugins.rotary.cuda:bind",
)
