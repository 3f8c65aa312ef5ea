"""Attributes of Router, by what they say."""

from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 2},
    "renormalized": {"top_k": 8, "renormalize": 1},
    "all": {"top_k": 64},
    "one": {"top_k": 1, "scale": 2.5},
    "sigmoid": {"top_k": 6, "scoring": 1, "renormalize": 1, "scale": 1.8},
    "groups": {"top_k": 6, "scoring": 1, "renormalize": 1, "groups": 8, "top_groups": 3},
}
