"""A norm and the choice of experts after it, in one launch of few tokens."""

# ruff: noqa: RUF005 - Triton has no starred tuples

import triton
import triton.language as tl

from slipstream.plugins.router.cuda_kernels import choose


@triton.jit
def normed_router_kernel(
    x, weight, gain, bias, correction, y, logits, counters, ids, weights, eps, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits float32 [T, EXPERTS] of ROWS experts a program, a token along the second axis.

    Every program normalizes the row for itself, and the first stores it. The last of a token to be
    done chooses, whichever that is. counters int32: a zero a token, and left so.
    """
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    first = tl.program_id(0) * ROWS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    factors = ()
    biases = ()
    for r in tl.static_range(ROWS):
        row = tl.minimum(first + r, EXPERTS - 1)
        factors = factors + (tl.load(weight + row * WIDTH + columns, inside, 0.0),)
        if bias is not None:
            biases = biases + (tl.load(bias + row),)
    gains = tl.load(gain + columns, inside, 0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    values = tl.load(x + token * WIDTH + columns, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values) / WIDTH + eps)
    normed = (values * inverse * gains.to(tl.float32)).to(y.dtype.element_ty)
    if first == 0:
        tl.store(y + token * WIDTH + columns, normed, inside)
    for r in tl.static_range(ROWS):
        logit = tl.sum(factors[r].to(tl.float32) * normed.to(tl.float32))
        expert = first + r
        if bias is not None:
            logit += biases[r].to(tl.float32)
        tl.store(logits + token * EXPERTS + expert, logit, expert < EXPERTS)
    tl.debug_barrier()
    if tl.atomic_add(counters + token, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counters + token, 0)
        places = tl.arange(0, BLOCK)
        found = tl.load(
            logits + token * EXPERTS + places, places < EXPERTS, float("-inf"), cache_modifier=".cg"
        )
        choose(
            found, correction, ids, weights, token, scale,
            EXPERTS, BLOCK, TOP_K, SLOTS, SIGMOID, CORRECTED, RENORMALIZE, GROUPS, TOP_GROUPS,
        )  # fmt: skip
