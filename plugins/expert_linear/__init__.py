"""x·Wᵀ where each row of x has the weight of an expert of its own."""

from dataclasses import replace

from slipstream.plugins.gated_mlp import GATE
from slipstream.plugins.linear import FORMAT, MAX_K, MAX_N, WEIGHT
from slipstream.plugins.router import MAX_EXPERTS
from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="ExpertLinear",
    doc="A product with the weights of each token's experts. Without reduce, the row of a token is "
    "multiplied by all of them, and y has a row for each, gated if asked for; with reduce, every "
    "expert has a row of its own, and y is the sum of the products times expert_weights, plus "
    "residual. No row of y depends on the experts of another token.",
    inputs=(
        TensorSpec(
            "x",
            ACTIVATION_DTYPES,
            ("tokens*(1+reduce*(top_k-1))", "in_features"),
            "a row of each token, or with reduce of each of its experts",
        ),
        replace(
            WEIGHT,
            doc="canonical graph: the weights of all experts [experts*N, K], one below the other; "
            "lowered graph: their blobs, as Linear has them, in the same order",
        ),
        TensorSpec("expert_ids", ("int32",), ("tokens", "top_k"), "as Router gives them"),
        TensorSpec(
            "expert_weights",
            ("float32",),
            ("tokens", "top_k"),
            "factors of the products; with reduce only, which needs them",
            optional=True,
        ),
        TensorSpec(
            "bias",
            ACTIVATION_DTYPES,
            ("experts*out_features",),
            "added to every product, those of all experts one after the other",
            optional=True,
        ),
        TensorSpec(
            "residual",
            ACTIVATION_DTYPES,
            ("tokens", "out_features"),
            "added to the sum; with reduce only",
            optional=True,
        ),
    ),
    outputs=(
        TensorSpec(
            "y",
            ACTIVATION_DTYPES,
            ("tokens*(top_k-reduce*(top_k-1))", "out_features//(1+gated)"),
            "the products, or with reduce the sum",
        ),
    ),
    attributes=(
        AttributeSpec("in_features", "int", "K", within=(1, MAX_K)),
        AttributeSpec(
            "out_features",
            "int",
            "N of one expert, gate and up rows both counted",
            within=(1, MAX_N),
        ),
        AttributeSpec("experts", "int", "experts of the layer", within=(1, MAX_EXPERTS)),
        AttributeSpec("top_k", "int", "experts a token", within=(1, MAX_EXPERTS)),
        AttributeSpec(
            "reduce", "int", "1: the products of a token are weighted and added up", 0, (0, 1)
        ),
        *FORMAT,
        AttributeSpec(
            "gated", "int", "1: an expert's first N/2 rows are gates, the others ups", 0, (0, 1)
        ),
        GATE,
    ),
    reference="slipstream.plugins.expert_linear.reference:expert_linear",
    native="slipstream.plugins._cpu",
    checked=True,
    cuda="slipstream.plugins.expert_linear.cuda.bind:expert_linear",
)
