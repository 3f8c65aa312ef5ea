"""x·Wᵀ with a weight in any ``WeightFormat``, and the row lookup that shares a tied weight."""

from dataclasses import replace

from slipstream.plugins.gated_mlp import GATE
from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

# How a format's zero is spelled in the zero_kind attribute.
ZERO_KINDS = {"midpoint": 0, "zero": 1, "offset": 2}
# The type of the codes in an engine, and how x is rounded for a product in that type.
WEIGHT_TYPES = {
    "int": 0,
    "float8_e4m3": 1,
    "bfloat16": 2,
    "float16": 3,
    "float32": 4,
    "float4_e2m1": 5,
}
ACTIVATIONS = {"none": 0, "token": 1, "static": 2, "group": 3, "block": 4}
# Far beyond any model, and small enough that no size of a weight overflows.
MAX_K, MAX_N = 2**24, 2**28

FORMAT = (
    AttributeSpec("bits", "int", "bits of a code: 4 or 8", 0, (0, 32)),
    AttributeSpec("group_size", "int", "elements along K that share a scale", 0, (0, MAX_K)),
    AttributeSpec("zero_kind", "int", "0 midpoint, 1 zero points, 2 offsets", 0, (0, 2)),
    AttributeSpec("scale_bytes", "int", "bytes of a stored scale or offset: 2 or 4", 2, (0, 4)),
    AttributeSpec(
        "weight_type",
        "int",
        "0 integer groups, 1 float8_e4m3, 2 bfloat16, 3 float16, 4 float32, 5 float4_e2m1 in "
        "groups of 32 whose scales are float8_e8m0fnu",
        0,
        (0, 5),
    ),
    AttributeSpec("group_rows", "int", "rows that share a scale: 1 or 128", 1, (1, MAX_N)),
    AttributeSpec(
        "activation",
        "int",
        "how x is rounded: 0 not, 1 by a scale a token, 2 by input_scale, 3 by a scale a group, "
        "4 to int8 in blocks of 32, each by its own range",
        0,
        (0, 4),
    ),
)
WEIGHT = TensorSpec(
    "weight",
    ("uint8",),
    (),
    "canonical graph: the weight [N, K] in its own format; lowered graph: one packed blob "
    "(cpu/packing.py and cuda/packing.py write it), which the attributes describe",
    weight="product",
)

SPEC = OperatorSpec(
    name="Linear",
    doc="y = norm(x)·Wᵀ + bias + residual, where norm, bias and residual are optional; a gated "
    "Linear returns the gated activation of a weight that stacks gate rows over up rows.",
    inputs=(
        TensorSpec("x", ACTIVATION_DTYPES, ("tokens", "in_features"), "activations"),
        WEIGHT,
        TensorSpec(
            "bias", ACTIVATION_DTYPES, ("out_features",), "added to every row", optional=True
        ),
        TensorSpec(
            "residual",
            ACTIVATION_DTYPES,
            ("tokens", "out_features//(1+gated)"),
            "added to the product",
            optional=True,
        ),
        TensorSpec(
            "norm_weight",
            ACTIVATION_DTYPES,
            ("in_features",),
            "RMS norm of x before the product",
            optional=True,
        ),
    ),
    outputs=(
        TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "out_features//(1+gated)"), "the product"),
    ),
    attributes=(
        AttributeSpec("in_features", "int", "K", within=(1, MAX_K)),
        AttributeSpec("out_features", "int", "N, gate and up rows both counted", within=(1, MAX_N)),
        *FORMAT,
        AttributeSpec("gated", "int", "1: the first N/2 rows are gates, the others ups", 0, (0, 1)),
        GATE,
        AttributeSpec("norm_eps", "float", "epsilon of the RMS norm", 1e-6),
    ),
    reference="slipstream.plugins.linear.reference:linear",
    native="slipstream.plugins._cpu",
    checked=True,
    cuda="slipstream.plugins.linear.cuda.bind:linear",
)

EMBEDDING_SPEC = OperatorSpec(
    name="Embedding",
    doc="Rows of a weight [V, K] by token id; the weight may be the output Linear's packed one.",
    inputs=(
        TensorSpec("token_ids", ("int32",), ("tokens",), "row numbers"),
        replace(WEIGHT, weight="rows"),
    ),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "in_features"), "dequantized rows"),),
    attributes=(
        AttributeSpec("in_features", "int", "K", within=(1, MAX_K)),
        AttributeSpec("out_features", "int", "V", within=(1, MAX_N)),
        *FORMAT,
    ),
    reference="slipstream.plugins.linear.reference:embedding",
    native="slipstream.plugins._cpu",
    checked=True,
    cuda="slipstream.plugins.linear.cuda.bind:embedding",
)

SHARD_SPEC = OperatorSpec(
    name="EmbeddingShard",
    doc="Rows of the part [V, K] of a table that one of several ranks has; zeros for a token whose "
    "row another rank has.",
    inputs=(
        TensorSpec("token_ids", ("int32",), ("tokens",), "row numbers of the whole table"),
        replace(WEIGHT, weight="rows"),
        TensorSpec("first", ("int32",), ("one",), "[1]: the row of the whole table that is first"),
    ),
    outputs=EMBEDDING_SPEC.outputs,
    attributes=EMBEDDING_SPEC.attributes,
    reference="slipstream.plugins.linear.reference:embedding_shard",
    cuda="slipstream.plugins.linear.cuda.bind:embedding_shard",
)
