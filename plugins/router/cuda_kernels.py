"""The experts of each token, in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin


@triton.jit
def _ordered(keys):
    """int32 in the order of float32 keys that are no NaN: a warp finds the largest of its integers
    by one instruction."""
    bits = keys.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(keys, places):
    """The place of the largest of ordered keys, the first of equal ones."""
    return tl.min(tl.where(keys == tl.max(keys, axis=0), places, 1 << 30), axis=0)


@triton.jit
def choose(
    x, correction, ids, weights, token, scale,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
):  # fmt: skip
    """Stores a token's experts and their weights by logits float32 [BLOCK], behind the last expert
    -infinity. TOP_K different ones, whatever the logits are."""
    places = tl.arange(0, BLOCK)
    inside = places < EXPERTS
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
            first = _best(_ordered(own), places)
            second = tl.max(tl.where(places == first, float("-inf"), own), axis=0)
            sums = tl.where(places == g, tl.max(own, axis=0) + second, sums)
        kept = places < 0
        for _ in tl.static_range(TOP_GROUPS):
            chosen = _best(_ordered(sums), places)
            kept = kept | (group == chosen)
            sums = tl.where(places == chosen, float("-inf"), sums)
        keys = tl.where(kept, keys, float("-inf"))
    order = _ordered(keys)
    bits = scores.to(tl.int32, bitcast=True)
    slots = tl.arange(0, SLOTS)
    found = tl.zeros([SLOTS], tl.int32)
    given = tl.zeros([SLOTS], tl.int32)
    LEAST: tl.constexpr = -(2**31)
    for k in tl.static_range(TOP_K):
        chosen = _best(order, places)
        found = tl.where(slots == k, chosen, found)
        given = tl.where(slots == k, tl.max(tl.where(places == chosen, bits, LEAST), axis=0), given)
        order = tl.where(places == chosen, LEAST, order)
    shares = tl.where(slots < TOP_K, given.to(tl.float32, bitcast=True), 0.0)
    if RENORMALIZE:
        shares = shares / (tl.sum(shares, axis=0) + 1e-20)
    at = token * TOP_K + slots
    tl.store(ids + at, found, slots < TOP_K)
    tl.store(weights + at, shares * scale, slots < TOP_K)


@triton.jit
def router_kernel(
    logits, correction, ids, weights, scale,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a token."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    x = tl.load(logits + token * EXPERTS + places, places < EXPERTS, float("-inf")).to(tl.float32)
    choose(
        x, correction, ids, weights, token, scale,
        EXPERTS, BLOCK, TOP_K, SLOTS, SIGMOID, CORRECTED, RENORMALIZE, GROUPS, TOP_GROUPS,
    )  # fmt: skip
