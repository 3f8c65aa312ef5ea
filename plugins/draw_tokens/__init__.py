"""One token of each row of logits by its own temperature, top-k, top-p and min-p, on a CPU.

Not a node of the engine graph: the sampler calls the kernel when a step's logits are there
(``plugins/native.py``). What samples on a GPU is in ``plugins/sampling``.
"""

from slipstream.plugins.spec import OperatorSpec, TensorSpec

_EACH = ("draws",)

SPEC = OperatorSpec(
    name="DrawTokens",
    doc="Temperature, then the top_k largest and what ties with the last of them, then of these "
    "the fewest and likeliest that have top_p of their probability, then those that have min_p of "
    "the likeliest's; of what is left the token at which the running sum of probabilities exceeds "
    "uniform. Tokens are in the order of their ids, those that tie with the last of top_p after "
    "all others; but from the likeliest down, equal ones by id, with top_k, and with top_p if "
    "2,048 or fewer reach it.",
    inputs=(
        TensorSpec("logits", ("float32",), ("rows", "vocab"), "of any number of rows"),
        TensorSpec("row", ("int32",), _EACH, "the row of each draw"),
        TensorSpec("temperature", ("float32",), _EACH, "0: the likeliest token, the first of them"),
        TensorSpec("top_k", ("int32",), _EACH, "0 or fewer: all"),
        TensorSpec("top_p", ("float32",), _EACH, "1 or more: all"),
        TensorSpec("min_p", ("float32",), _EACH, "0 to 1; 0: all"),
        TensorSpec("uniform", ("int64",), _EACH, "random numbers below 2^53, of which 2^53 is 1"),
    ),
    outputs=(
        TensorSpec("token", ("int32",), _EACH, "the tokens; -1 where peak is not finite"),
        TensorSpec(
            "peak", ("float32",), _EACH, "the largest logit of the row, or NaN if it has one"
        ),
    ),
    attributes=(),
    reference="slipstream.plugins.draw_tokens.reference:draw_tokens",
    native="slipstream.plugins._cpu",
    checked=True,
)
