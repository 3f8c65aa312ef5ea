"""x·Wᵀ with a weight in any ``WeightFormat``, and the row lookup that shares a tied weight."""

from slipstream.plugins.spec import AttributeSpec, OperatorSpec, TensorSpec

# How a format's zero is spelled in the zero_kind attribute.
ZERO_KINDS = {"midpoint": 0, "zero": 1, "offset": 2}

_FORMAT = (
    AttributeSpec("bits", "int", "bits of a code: 4 or 8", 0),
    AttributeSpec("group_size", "int", "elements along K that share a scale", 0),
    AttributeSpec("zero_kind", "int", "0 midpoint, 1 zero points, 2 offsets", 0),
    AttributeSpec("scale_bytes", "int", "bytes of a stored scale or offset: 2 or 4", 2),
)
_WEIGHT = TensorSpec(
    "weight",
    ("uint8",),
    (),
    "canonical graph: the weight [N, K] in its own format; lowered graph: one packed blob "
    "(plugins/linear/packing.py), which the attributes below describe",
)

SPEC = OperatorSpec(
    name="Linear",
    doc="y = norm(x)·Wᵀ + bias + residual, where norm, bias and residual are optional; a gated "
    "Linear returns silu(gate)·up of a weight that stacks gate rows over up rows.",
    inputs=(
        TensorSpec("x", ("float32",), ("T", "in_features"), "activations"),
        _WEIGHT,
        TensorSpec("bias", ("float32",), ("out_features",), "added to every row", optional=True),
        TensorSpec(
            "residual",
            ("float32",),
            ("T", "out_features//(1+gated)"),
            "added to the product",
            optional=True,
        ),
        TensorSpec(
            "norm_weight",
            ("float32",),
            ("in_features",),
            "RMS norm of x before the product",
            optional=True,
        ),
    ),
    outputs=(TensorSpec("y", ("float32",), ("T", "out_features//(1+gated)"), "the product"),),
    attributes=(
        AttributeSpec("in_features", "int", "K"),
        AttributeSpec("out_features", "int", "N, gate and up rows both counted"),
        *_FORMAT,
        AttributeSpec("gated", "int", "1: the first N/2 rows are gates, the others ups", 0),
        AttributeSpec("norm_eps", "float", "epsilon of the RMS norm", 1e-6),
    ),
    reference="slipstream.plugins.linear.reference:linear",
)

EMBEDDING_SPEC = OperatorSpec(
    name="Embedding",
    doc="Rows of a weight [V, K] by token id; the weight may be the output Linear's packed one.",
    inputs=(
        TensorSpec("token_ids", ("int32",), ("T",), "row numbers"),
        _WEIGHT,
    ),
    outputs=(TensorSpec("y", ("float32",), ("T", "in_features"), "dequantized rows"),),
    attributes=(
        AttributeSpec("in_features", "int", "K"),
        AttributeSpec("out_features", "int", "V"),
        *_FORMAT,
    ),
    reference="slipstream.plugins.linear.reference:embedding",
)
