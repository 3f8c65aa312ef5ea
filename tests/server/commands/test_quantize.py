from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import make_plan
from slipstream.server.cli import slipstream
from slipstream.server.text import format_bytes

ROOT = Path(__file__).parents[3]


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["quantize", *map(str, arguments)])


@pytest.fixture
def little(tmp_path: Path) -> list[str]:
    """Options that make a run short."""
    text = tmp_path / "eval.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 8)
    return ["--eval-dataset", str(text)]


def test_quantize_writes_a_checkpoint_that_builds_and_says_what_it_cost(
    tiny_checkpoint: Path, tmp_path: Path, little: list[str]
) -> None:
    output = tmp_path / "my model"
    result = run(tiny_checkpoint, "-o", output, "--qformat", "int8_wo", *little)
    assert result.exit_code == 0, result.output
    stored = json.loads((output / "quantization_report.json").read_text())
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"wrote {output} in ") and format_bytes(stored["size"]) in first
    change = stored["accuracy"]["perplexity_increase"]
    assert any(line.lstrip().startswith("perplexity") and f"{change:+.2%}" in line for line in rest)
    assert any("worst linear" in line for line in rest)
    assert rest[-1] == f"next: slipstream build '{output}' -o engine"
    progress = result.stderr.splitlines()
    assert progress[0] == "quantizing layers: 0 of 3"
    assert progress[3].startswith("quantizing layers: 3 of 3 after ")
    assert progress[3].endswith(" 0 s left")
    built = CliRunner().invoke(slipstream, ["build", str(output), "-o", str(tmp_path / "engine")])
    assert built.exit_code == 0, built.output
    assert "int8" in built.stdout


def test_options_reach_the_plan(tiny_checkpoint: Path, tmp_path: Path, little: list[str]) -> None:
    options = ["--qformat", "int4_wo", "--group-size", 32, "--symmetric", "--format", "gptq"]
    options += ["--override", "re:.*down_proj=int8_wo", "--override", "re:.*o_proj=dense"]
    options += ["--exclude", "model.layers.1.mlp.up_proj"]
    result = run(tiny_checkpoint, "-o", tmp_path / "out", *options, *little)
    assert result.exit_code == 0, result.output
    made = open_checkpoint(tmp_path / "out")
    formats = {name: made.tensor(name).format for name in made.names()}
    assert formats["model.layers.0.mlp.gate_proj.weight"].group == 32
    assert formats["model.layers.0.mlp.gate_proj.weight"].zero == "midpoint"
    assert formats["model.layers.2.mlp.down_proj.weight"].bits == 8
    assert formats["model.layers.0.self_attn.o_proj.weight"].kind == "dense"
    assert formats["model.layers.1.mlp.up_proj.weight"].kind == "dense"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["options"]["overrides"][1] == "re:.*o_proj=dense"


def test_a_dry_run_prints_the_plan_and_reads_no_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream.weights import safetensors

    monkeypatch.setattr(safetensors, "map_array", None)
    arguments = ["--qformat", "int4_gptq", "--exclude", "re:.*o_proj", "--group-size", 128]
    result = run(tiny_checkpoint, "-o", tmp_path / "out", "--dry-run", *arguments)
    assert result.exit_code == 0, result.output
    options = QuantizeOptions("int4_gptq", exclude=["re:.*o_proj"], group_size=128)
    plan = make_plan(open_checkpoint(tiny_checkpoint), options)
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines() if "  " in line)
    assert rows["size"].strip().startswith(format_bytes(plan.nbytes))
    assert rows["bits"].strip().startswith(f"{plan.effective_bits:.2f} a weight")
    assert rows["memory"].strip().startswith(f"about {format_bytes(plan.memory)}")
    assert rows["time"].strip().startswith("about 1 min")
    assert rows["3 down_proj"].strip() == "int4_gptq, groups of 128"
    assert rows["3 o_proj"].strip() == "dense"
    assert "has groups of 64: 128 does not divide its 64 columns (3 layers)" in result.stdout
    assert not (tmp_path / "out").exists()


def test_calibration_text_can_come_from_the_model_itself(
    tiny_checkpoint: Path, tmp_path: Path, little: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--qformat", "int4_gptq", "--calib-dataset", "self", *little]
    arguments += ["--calib-size", "2", "--calib-max-seq-length", "64"]
    result = run(tiny_checkpoint, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["calibration"] == "2 windows of 64 tokens of self"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-o DIRECTORY"),
        (["-o", "e", "--qformat", "int3"], "'int3' is not one of 'int4_awq'"),
        (["-o", "e", "--group-size", "48"], "group_size is 48; it must be one of 32, 64, 128, -1"),
        (["-o", "e", "--calib-size", "0"], "--calib-size"),
        (["-o", "e", "--override", "down_proj"], "write TARGET=QFORMAT"),
        (["-o", "e", "--auto-bits", "2"], "auto_bits is 2.0; it must be between 4 and 9"),
        (["-o", "e", "--max-ppl-increase", "-1"], "max_ppl_increase is -1.0"),
        (["-o", "e", "--calib", "x"], "--calib"),
    ],
)
def test_bad_usage(tiny_checkpoint: Path, arguments: list[str], message: str) -> None:
    result = run(tiny_checkpoint, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("missing", [], "does not exist"),
        (None, ["--exclude", "lm_head"], "'lm_head' matches none of the 21 linears"),
        (None, ["--calib-dataset", "nothing.txt"], "nothing.txt cannot be read"),
        (
            None,
            ["--qformat", "int4_wo", "--max-ppl-increase", "0", "--eval-dataset", "CAT"],
            "rose",
        ),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tiny_checkpoint: Path, tmp_path: Path, checkpoint: str | None, options: list[str], message: str
) -> None:
    cat = tmp_path / "cat.txt"
    cat.write_text("The cat sat on the mat, and the dog jumped over the fox. " * 20)
    options = [str(cat) if option == "CAT" else option for option in options]
    source = tiny_checkpoint if checkpoint is None else tmp_path / checkpoint
    result = run(source, "-o", tmp_path / "out", *options)
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert [path.name for path in tmp_path.iterdir()] == ["cat.txt"]


def test_it_is_a_program_of_its_own() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["slipstream-quantize"] == "slipstream.server.cli:quantize_main"
    from slipstream.server import cli

    assert callable(cli.quantize_main)
