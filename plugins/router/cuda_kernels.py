"""The experts of each token, in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin


@triton.jit
def _best(keys, places):
    """The place of the largest key, the first of equal ones."""
    return tl.min(tl.where(keys == tl.max(keys, axis=0), places, 1 << 30), axis=0)


@triton.jit
def router_kernel(
    logits, correction, ids, weights, scale,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr, RENORMALIZE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a token. Every token has TOP_K different experts, whatever its logits are."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < EXPERTS
    x = tl.load(logits + token * EXPERTS + places, inside, float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        powers = tl.exp(x - tl.max(x, axis=0))
        scores = powers / tl.sum(powers, axis=0)
    keys = scores
    if CORRECTED:
        keys += tl.load(correction + places, inside, 0.0).to(tl.float32)
    # What is taken, or no expert, is lower than any key; a NaN is the lowest key.
    keys = tl.where(keys > -1e30, keys, -1e30)
    keys = tl.where(inside, keys, float("-inf"))
    if GROUPS > 1:
        SIZE: tl.constexpr = EXPERTS // GROUPS
        group = places // SIZE
        sums = tl.full([BLOCK], float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            own = tl.where(group == g, keys, float("-inf"))
            first = _best(own, places)
            second = tl.max(tl.where(places == first, float("-inf"), own), axis=0)
            sums = tl.where(places == g, tl.max(own, axis=0) + second, sums)
        kept = places < 0
        for _ in tl.static_range(TOP_GROUPS):
            chosen = _best(sums, places)
            kept = kept | (group == chosen)
            sums = tl.where(places == chosen, float("-inf"), sums)
        keys = tl.where(kept, keys, float("-inf"))
    slots = tl.arange(0, SLOTS)
    found = tl.zeros([SLOTS], tl.int32)
    given = tl.zeros([SLOTS], tl.float32)
    for k in tl.static_range(TOP_K):
        chosen = _best(keys, places)
        found = tl.where(slots == k, chosen, found)
        given = tl.where(slots == k, tl.sum(tl.where(places == chosen, scores, 0.0), axis=0), given)
        keys = tl.where(places == chosen, float("-inf"), keys)
    if RENORMALIZE:
        given = given / (tl.sum(given, axis=0) + 1e-20)
    at = token * TOP_K + slots
    tl.store(ids + at, found, slots < TOP_K)
    tl.store(weights + at, given * scale, slots < TOP_K)
