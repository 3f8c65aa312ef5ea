"""What ranks of a tensor-parallel engine give each other: sums, and columns side by side.

Every rank runs the same graph on its own shard, and all of them come to the same node with x of
one shape. ``cpu/ranks.h`` says how ranks on a CPU meet.
"""

from slipstream.plugins.spec import ACTIVATION_DTYPES, AttributeSpec, OperatorSpec, TensorSpec

MAX_RANKS = 8

_X = TensorSpec("x", ACTIVATION_DTYPES, ("rows", "columns"), "what this rank has")
_RANKS = AttributeSpec("ranks", "int", "how many ranks there are", within=(2, MAX_RANKS))

SPEC = OperatorSpec(
    name="AllReduce",
    doc="The sum of x over all ranks, added up in the order of the ranks: the same bits on each.",
    inputs=(_X,),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("rows", "columns"), "the sum"),),
    attributes=(_RANKS,),
    reference="slipstream.plugins.collectives.reference:all_reduce",
    native="slipstream.plugins._cpu",
    checked=True,
    cuda="slipstream.plugins.collectives.cuda.bind:all_reduce",
)

ADD_NORM_SPEC = OperatorSpec(
    name="AllReduceAddRMSNorm",
    doc="sum = the sum of x over all ranks + residual; y = sum / sqrt(mean(sum²) + eps) * weight.",
    inputs=(
        TensorSpec("x", ACTIVATION_DTYPES, ("tokens", "hidden"), "what this rank has"),
        TensorSpec("residual", ACTIVATION_DTYPES, ("tokens", "hidden"), "the residual stream"),
        TensorSpec("weight", ACTIVATION_DTYPES, ("hidden",), "norm weight"),
    ),
    outputs=(
        TensorSpec("y", ACTIVATION_DTYPES, ("tokens", "hidden"), "the normalized sum"),
        TensorSpec("sum", ACTIVATION_DTYPES, ("tokens", "hidden"), "the new residual stream"),
    ),
    attributes=(_RANKS, AttributeSpec("norm_eps", "float", "epsilon of the norm")),
    reference="slipstream.plugins.collectives.reference:all_reduce_add_rms_norm",
    cuda="slipstream.plugins.collectives.cuda.bind:all_reduce_add_rms_norm",
)

GATHER_SPEC = OperatorSpec(
    name="AllGather",
    doc="The columns of x of all ranks, side by side in the order of the ranks.",
    inputs=(_X,),
    outputs=(TensorSpec("y", ACTIVATION_DTYPES, ("rows", "ranks*columns"), "those of all"),),
    attributes=(_RANKS,),
    reference="slipstream.plugins.collectives.reference:all_gather",
    native="slipstream.plugins._cpu",
    checked=True,
    cuda="slipstream.plugins.collectives.cuda.bind:all_gather",
)
