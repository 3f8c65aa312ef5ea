"""The RMS norm in front of a mixture of experts and the choice of its experts, as one operator."""

from slipstream.plugins.linear import FORMAT, MAX_K, WEIGHT
from slipstream.plugins.router import MAX_EXPERTS
from slipstream.plugins.router import SPEC as ROUTER
from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="NormedRouter",
    doc="y = norm(x), and Router of the logits y·Wᵀ + bias.",
    inputs=(
        TensorSpec("x", ACTIVATION_DTYPES, ("tokens", "in_features"), "the residual stream"),
        WEIGHT,
        TensorSpec("norm_weight", ACTIVATION_DTYPES, ("in_features",), "of the RMS norm"),
        TensorSpec(
            "bias", ACTIVATION_DTYPES, ("out_features",), "added to the logits", optional=True
        ),
        TensorSpec("correction", ("float32",), ("out_features",), "as Router's is", optional=True),
    ),
    outputs=(
        TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "in_features"), "the normalized rows"),
        *ROUTER.outputs,
    ),
    attributes=(
        AttributeSpec("in_features", "int", "K", within=(1, MAX_K)),
        AttributeSpec("out_features", "int", "experts", within=(1, MAX_EXPERTS)),
        *FORMAT,
        AttributeSpec("norm_eps", "float", "epsilon of the RMS norm"),
        *ROUTER.attributes,
    ),
    reference="slipstream.plugins.normed_router.reference:normed_router",
    cuda="slipstream.plugins.normed_router.cuda:bind",
)
