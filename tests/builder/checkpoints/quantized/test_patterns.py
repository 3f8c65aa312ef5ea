"""Patterns of a foreign config.json: what Python's `re` says of them, in a time that is bounded."""

from __future__ import annotations

import re

import pytest

from slipstream.builder.checkpoints.quantized.patterns import matches
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin

SETTINGS = Fields({}, Origin("config.json", "download it again"))
MODULES = (
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.17.mlp.experts.3.down_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
)


def fits(pattern: str, module: str) -> bool:
    return matches(pattern, module, SETTINGS, "ignore")


@pytest.mark.parametrize(
    "pattern",
    [
        ".*lm_head",
        "lm_head|model.layers.1.",
        ".*mlp.gate$",
        "gate",
        r".*layers\.(1|17)\..*",
        "^(?!.*experts).*$",
        "(?!.*(?:self_attn|[)(]|\\)))(?:.*layers)",
        r"^(?=.*mlp)(?!.*gate$)",
        "^(?!.*(?:q_proj|vision_tower\\..*)$).*$",
        "(?i)LM_HEAD",
        r"model\.layers\.\d+\.mlp\.(?P<which>gate|up)_proj",
    ],
)
def test_they_mean_what_they_mean_in_python(pattern: str) -> None:
    expected = [re.match(pattern, module) is not None for module in MODULES]
    assert [fits(pattern, module) for module in MODULES] == expected
    assert any(expected) is (pattern != "gate") and not all(expected)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(?!(a*)*b)(a|aa)+$", "a*" * 50 + "$"])
def test_none_takes_forever(pattern: str) -> None:
    """Each of them would take Python's `re` years."""
    assert not fits(pattern, "a" * 200 + "!")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "unclosed group"),
        ("a)|(?:b", "unopened group"),
        (r"(a)\1", "backreferences are not supported"),
        ("a(?!b)", "look-around, .* is not supported"),
        ("(?!a)b|c", "look-around, .* is not supported"),
        ("(?!a", "look-around, .* is not supported|unclosed group"),
        ("(?:a{1000}){1000}", "exceeds size limit"),
        ("(" * 3000, "."),
        ("[" * 3000, "."),
        ("(?!" + "[" * 3000, "."),
        ("a" * 5000, "more than 4000 characters"),
    ],
)
def test_what_cannot_be_matched_so_is_refused(pattern: str, reason: str) -> None:
    message = rf"config.json: ignore has the pattern .*can be matched \(.*({reason}).*\); download"
    with pytest.raises(CheckpointError, match=message):
        fits(pattern, "model.layers.0.mlp.gate")
