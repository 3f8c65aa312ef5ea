"""Sampling on the device that computed the logits, so that tokens need not visit the host.

Sampling is not a node of the engine graph: the executor launches it after the head, in the head's
CUDA graph. ``slipstream.runtime.sampling.sampler`` says what is computed; this folder does the same
with kernels, except that a draw uses other random numbers, and that tokens which tie at the edge of
the nucleus (top-p) are all kept.

A draw is the Gumbel-max trick: the token with the largest ``(logit - peak) / temperature -
log(E)`` among the survivors of top-k, top-p and min-p, where the ``E`` are independent
exponential numbers. They come from a counter-based generator addressed by (seed, output position,
token id), so a token never depends on what shares its batch.
"""

from __future__ import annotations

from enum import IntEnum

MAX_LOGPROBS = 20

# What a row's token is if its largest logit is NaN or infinite.
BROKEN = -2

# Columns of a row of logprob results: rank, log probability (bits of a float32), then the ids of
# the likeliest tokens (-1: there are no more) and their log probabilities (bits of float32), in the
# first columns of each, as many as were asked for.
RANK_COLUMN = 0
LOGPROB_COLUMN = 1
TOP_IDS_COLUMN = 2
TOP_VALUES_COLUMN = TOP_IDS_COLUMN + MAX_LOGPROBS
LOGPROB_COLUMNS = TOP_VALUES_COLUMN + MAX_LOGPROBS


class Kind(IntEnum):
    """Which kernels a step needs: those of its most demanding row."""

    GREEDY = 0
    SAMPLE = 1
    FULL = 2


class Field(IntEnum):
    """Rows of the parameter block ``[len(Field), max_rows]`` (int32; F: bits of a float32)."""

    SLOT = 0  # -1: padding
    POSITION = 1
    SEED_LOW = 2
    SEED_HIGH = 3
    TEMPERATURE = 4  # F; 0: the likeliest token
    TOP_K = 5  # 0: all
    TOP_P = 6  # F; 1: all
    MIN_P = 7  # F; 0: off
    FLAGS = 8
    NUM_BIASES = 9
    PROMPT_LEN = 10
    REPETITION_PENALTY = 11  # F
    PRESENCE_PENALTY = 12  # F
    FREQUENCY_PENALTY = 13  # F
    NUM_LOGPROBS = 14  # how many of the likeliest tokens are listed, where FLAGS say so
    MASK = 15  # the row of the bitmask that says what is allowed, where FLAGS say so


# Bits of Field.FLAGS.
MASKED = 1
PENALIZES = 2
LOGPROBS = 4
