from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slipstream.quantize.evaluate import accuracy
from slipstream.quantize.options import parse_override
from slipstream.quantize.report import record as module
from slipstream.quantize.report.record import LinearRow, Report, peak_memory, versions

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def linears(layers: int = 4) -> list[LinearRow]:
    rng = np.random.default_rng(0)
    return [
        LinearRow(
            name=f"model.layers.{layer}.{kind}",
            scheme="int4_awq",
            group=64,
            weights=64 * 128,
            bytes=64 * 64 + 64 * 2 * 2 + 64 * 2,
            weight_error=float(rng.uniform(0.005, 0.01)),
            output_error=float(rng.uniform(0.001, 0.01) * (1 + layer)),
            clip=0.93,
            alpha=None if kind.endswith("o_proj") else 0.35,
            tokens_seen=4096,
        )
        for layer in range(layers)
        for kind in KINDS
    ]


@pytest.fixture
def report() -> Report:
    rng = np.random.default_rng(1)
    reference = rng.normal(0, 3, (200, 50)).astype(np.float32)
    candidate = (reference + rng.normal(0, 0.3, reference.shape)).astype(np.float32)
    found = accuracy([reference], [candidate], [rng.integers(0, 50, 200).astype(np.int32)])
    return Report(
        source="Org/Model",
        output="out",
        qformat="int4_awq",
        kv_cache_dtype="auto",
        linears=linears(),
        size=100_000,
        size_before=320_000,
        parameters=160_000,
        accuracy=found,
        calibration="8 windows of 512 tokens of the shipped text",
        seed=7,
        seconds={"calibrate": 2.0, "evaluate": 3.5},
        peak_memory=512 << 20,
        options={"group_size": 64, "exclude": ("lm_head",)},
        versions=versions(),
    )


def test_json_holds_what_was_measured(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    found = json.loads((tmp_path / "quantization_report.json").read_text())
    assert found["accuracy"] == report.accuracy.as_dict()  # type: ignore[union-attr]
    assert found["effective_bits"] == pytest.approx(8 * (64 * 64 + 384) / (64 * 128))
    assert found["bits_per_parameter"] == 5.0
    assert found["options"] == {"group_size": 64, "exclude": ["lm_head"]}
    assert (found["seed"], found["peak_memory"]) == (7, 512 << 20)
    assert {"python", "slipstream", "numpy"} <= found["versions"].keys()
    assert len(found["linears"]) == 16
    row = found["linears"][0]
    assert row["name"] == "model.layers.0.self_attn.q_proj"
    assert {"scheme", "group", "weight_error", "output_error", "clip", "alpha"} <= row.keys()
    assert {"damping", "fallback", "tokens_seen", "bytes", "bits"} <= row.keys()


def test_the_worst_come_with_an_option_that_matches_them_alone(report: Report) -> None:
    worst = report.worst()
    errors = sorted((linear.error for linear in report.linears), reverse=True)
    assert [linear.error for linear in worst] == errors[:5]
    target, scheme = parse_override(worst[0].suggestion().removeprefix("--override "))
    assert scheme == "int8_wo"
    assert [row.name for row in report.linears if target.matches(row.name)] == [worst[0].name]
    wide = replace(worst[0], bytes=worst[0].weights + 100)
    assert wide.suggestion().startswith("--exclude model.layers.")


def test_without_data_the_weight_decides(report: Report) -> None:
    rows = [replace(linear, output_error=None) for linear in report.linears]
    worst = replace(report, linears=rows).worst()
    assert worst[0].error == max(linear.weight_error for linear in rows)


def test_markdown_shows_the_same(report: Report, tmp_path: Path) -> None:
    fallback = "the Hessian was singular: rounded to nearest"
    rows = [replace(report.linears[0], fallback=fallback), *report.linears[1:]]
    replace(report, linears=rows, notes=("lm_head stays dense",)).write(tmp_path)
    text = (tmp_path / "quantization_report.md").read_text()
    found = report.accuracy
    assert found is not None
    assert f"{found.increase:+.2%} ± {found.increase_standard_error:.2%}" in text
    assert f"{found.top1:.2%}" in text and f"{found.kl_mean:.4g}" in text
    assert "3.20x smaller" in text and "5.00 in the whole model" in text
    assert f"* `model.layers.0.self_attn.q_proj`: {fallback}" in text
    assert "* lm_head stays dense" in text
    assert "5.5 s (calibrate 2.0 s, evaluate 3.5 s)" in text and "512.0 MiB" in text
    for linear in report.linears:
        assert f"| `{linear.name}` | int4_awq | 64 |" in text
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_plots_are_a_picture_beside_it(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = report.write(tmp_path)
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    png = paths[2].read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
    assert (width, height) == (1440, 1020)
    assert "(quantization_report.png)" in paths[1].read_text()


def test_plots_of_little(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, little in (
        ("nothing", replace(report, linears=(), accuracy=None)),
        ("one", replace(report, linears=[LinearRow("lm_head", "int8_wo", 32, 64, 70, 0.0)])),
    ):
        (tmp_path / name).mkdir()
        assert len(little.write(tmp_path / name)) == 3
        assert json.loads((tmp_path / name / "quantization_report.json").read_text())


def test_without_matplotlib_a_line_says_so(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "slipstream.quantize.report.plots", raising=False)
    paths = report.write(tmp_path)
    assert [path.suffix for path in paths] == [".json", ".md"]
    assert "No plots: matplotlib is not installed" in paths[1].read_text()
    assert "slipstream.quantize.report.plots" not in sys.modules


def test_numbers_that_json_lacks(report: Report, tmp_path: Path) -> None:
    rows = [replace(linear, output_error=math.nan) for linear in report.linears[:1]]
    rows += report.linears[1:]
    broken = replace(report, linears=rows)
    assert all(math.isfinite(linear.error) for linear in broken.worst())
    broken.write(tmp_path)
    found = json.loads((tmp_path / "quantization_report.json").read_text())
    assert found["linears"][0]["output_error"] is None


def test_memory_is_in_bytes() -> None:
    assert 10 << 20 < peak_memory() < 1 << 40


def test_it_says_which_loaders_take_the_files(report: Report, tmp_path: Path) -> None:
    loaders = {"transformers": "it does not unpack zero points", "vLLM": ""}
    replace(report, loaders=loaders).write(tmp_path)
    assert json.loads((tmp_path / "quantization_report.json").read_text())["loaders"] == loaders
    text = (tmp_path / "quantization_report.md").read_text()
    assert "| loads in | Slipstream, vLLM |" in text
    assert "* transformers does not load it: it does not unpack zero points" in text


def test_experts_of_a_layer_are_shown_together_and_spared_together(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)  # plots take a second
    first = replace(report.linears[0], fallback=None)
    place = "model.layers.2.mlp.experts"
    rows = [
        replace(
            first,
            name=f"{place}.{expert}.up_proj",
            output_error=0.5 + expert / 10,
            tokens_seen=100 * expert,
            fallback="too little" if expert in (1, 3) else None,
        )
        for expert in range(4)
    ]
    mixed = replace(report, linears=[*report.linears, *rows])
    mixed.write(tmp_path)
    text = (tmp_path / "quantization_report.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{place}.*.up_proj` (4)"))
    assert "| 0.65 |" in line and line.endswith("| 0 to 300 |")
    assert str(4 * first.bytes) in line
    assert f"* `{place}.{{1, 3}}.up_proj`: too little" in text
    stored = json.loads((tmp_path / "quantization_report.json").read_text())
    assert [row["name"] for row in stored["linears"]][-4:] == [row.name for row in rows]
    option, scheme = rows[0].suggestion().removeprefix("--override ").rsplit("=", 1)
    target = parse_override(f"{option.strip(chr(39))}={scheme}")[0]
    assert all(target.matches(row.name) for row in rows)
    assert not target.matches("model.layers.20.mlp.experts.1.up_proj")
    assert not target.matches("model.layers.2.mlp.gate")
