"""Which experts of a layer a token goes to, and with what weights."""

from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

# How a logit becomes the weight of its expert.
SCORINGS = {"softmax": 0, "sigmoid": 1}
MAX_EXPERTS = 4096  # far beyond any model

SPEC = OperatorSpec(
    name="Router",
    doc="The top_k experts of each token, best first; of equal ones the first. Experts are chosen "
    "by score plus correction, within the top_groups groups of neighbours whose two best add up to "
    "the most, and weighted by their scores.",
    inputs=(
        TensorSpec("logits", ACTIVATION_DTYPES, ("tokens", "experts"), "one of each expert"),
        TensorSpec(
            "correction",
            ("float32",),
            ("experts",),
            "added to scores to choose, not to weight; its differences may be far smaller than "
            "it is",
            optional=True,
        ),
    ),
    outputs=(
        TensorSpec("expert_ids", ("int32",), ("tokens", "top_k"), "experts, all different"),
        TensorSpec("expert_weights", ("float32",), ("tokens", "top_k"), "factors of their outputs"),
    ),
    attributes=(
        AttributeSpec("top_k", "int", "experts a token", within=(1, MAX_EXPERTS)),
        AttributeSpec("scoring", "int", "0 softmax over all experts, 1 sigmoid", 0, (0, 1)),
        AttributeSpec("renormalize", "int", "1: the weights of a token add up to scale", 0, (0, 1)),
        AttributeSpec("scale", "float", "factor of the weights", 1.0),
        AttributeSpec(
            "groups",
            "int",
            "equal groups of neighbours, two experts or more each",
            1,
            (1, MAX_EXPERTS),
        ),
        AttributeSpec("top_groups", "int", "groups a token chooses from", 1, (1, MAX_EXPERTS)),
    ),
    reference="slipstream.plugins.router.reference:router",
    native="slipstream.plugins._cpu",
    checked=True,
    cuda="slipstream.plugins.router.cuda:bind",
)
