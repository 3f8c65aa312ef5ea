"""The likeliest token of each row of logits, found where these are made: in the session, on its
threads, while they are in the caches."""

from slipstream.plugins.spec import OperatorSpec, TensorSpec

SPEC = OperatorSpec(
    name="TopToken",
    doc="The largest logit of each row and its token, the first of equal ones.",
    inputs=(TensorSpec("logits", ("float32",), ("rows", "vocab"), "one or more a row"),),
    outputs=(
        TensorSpec("token", ("int32",), ("rows",), "the tokens; -1 where logit is not finite"),
        TensorSpec("logit", ("float32",), ("rows",), "the largest, or NaN if the row has one"),
    ),
    attributes=(),
    reference="slipstream.plugins.top_token.reference:top_token",
    native="slipstream.plugins._cpu",
    checked=True,
)
