from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest

from slipstream.errors import BuildError
from slipstream.quantize.options import (
    SCHEMES,
    QFormat,
    QuantizeOptions,
    Target,
    parse_override,
)


def test_every_qformat_has_a_scheme() -> None:
    assert tuple(SCHEMES) == get_args(QFormat)
    assert all(name == scheme.name for name, scheme in SCHEMES.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"qformat": "int3"}, "qformat is 'int3'; it must be one of int4_awq"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4'"),
        ({"format": "gguf"}, "format is 'gguf'"),
        ({"group_size": 48}, "group_size is 48; it must be one of 32, 64, 128, -1"),
        ({"group_size": -1, "qformat": "fp8_block"}, "fp8_block has one for a square; use 32, 64"),
        ({"group_size": -1, "overrides": ["re:.*o_proj=fp8_block"]}, "or fp8 for a scale a row"),
        ({"calib_size": 0}, "calib_size is 0; it must be at least 1"),
        ({"calib_max_seq_length": 8}, "calib_max_seq_length is 8; it must be at least 16"),
        ({"seed": -1}, "seed is -1"),
        ({"max_ppl_increase": -2.0}, "max_ppl_increase is -2.0"),
        ({"max_ppl_increase": float("nan")}, "max_ppl_increase is nan"),
        ({"auto_bits": 3.0}, "auto_bits is 3.0; it must be between 4 and 9"),
        ({"auto_bits": 5.0, "qformat": "fp8"}, "qformat is fp8; use int4_awq, int4_gptq"),
        ({"auto_bits": 5.0, "qformat": "nvfp4"}, "qformat is nvfp4"),
        ({"exclude": ["re:("]}, r"target 're:\(' cannot be read"),
        ({"exclude": ["re:"]}, "it is empty"),
        ({"overrides": ["re:.*down_proj"]}, "write TARGET=QFORMAT"),
        ({"overrides": ["re:.*=int5"]}, "QFORMAT is one of int4_awq"),
        ({"overrides": ["=int8_wo"]}, "target '' cannot be read"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        QuantizeOptions(**values)


def test_targets_match_whole_names() -> None:
    name = "model.layers.1.mlp.up_proj"
    assert Target.parse(name).matches(name)
    assert not Target.parse(name).matches("model.layers.10.mlp.up_proj")
    assert not Target.parse("model.layers.1.mlp").matches(name)
    assert not Target.parse("model-layers-1-mlp-up_proj").matches(name)
    pattern = Target.parse(r"re:.*\.(up|down)_proj")
    assert pattern.matches(name) and not pattern.matches(f"{name}.bias")


def test_overrides_may_hold_an_equals_sign_in_their_pattern() -> None:
    target, qformat = parse_override("re:(?=.*layers).*o_proj=dense")
    assert qformat == "dense" and target.matches("model.layers.0.self_attn.o_proj")


def test_symmetric_changes_only_what_can_have_zero_points() -> None:
    options = QuantizeOptions(symmetric=False)
    assert not options.scheme("int8_wo").symmetric and options.scheme("fp8").symmetric
    assert options.scheme("w4a8_awq").symmetric and options.scheme("int8_sq").symmetric
    assert all(QuantizeOptions().scheme(name).symmetric for name in SCHEMES)


def test_options_need_no_numpy() -> None:
    check = "import sys, slipstream.quantize.options; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
