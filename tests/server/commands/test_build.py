from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from slipstream.builder.build import plan
from slipstream.builder.contract import bytes_per_token, kv_dtype_of
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda import detect
from slipstream.server import engine_kernels
from slipstream.server.cli import slipstream
from slipstream.server.text import format_bytes


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["build", *map(str, arguments)])


def test_build_writes_an_engine_and_says_what_is_in_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my engine"
    result = run(tiny_checkpoint, "-o", output, "--quantization", "int8_wo", "--group-size", 32)
    assert result.exit_code == 0, result.output
    engine = open_engine(output)
    engine.verify_files()
    assert engine.manifest.quantization == "int8_wo"
    size = sum(file.stat().st_size for file in output.iterdir())
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"built {output} in ") and format_bytes(size) in first
    assert any("slipstream int8, groups of 32" in line for line in rest)
    assert rest[-1] == f"next: slipstream generate '{output}' \"Why is the sky blue?\""
    assert result.stderr == f"building {output} from {tiny_checkpoint}\n"


def test_options_reach_the_build(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--max-seq-len", 96, "--max-batch-size", 3, "--max-num-tokens", 17]
    options += ["--kv-cache-dtype", "int8", "--target", "cpu", "--gemm-plugin", "disable"]
    options += ["--quantization", "int4_wo", "--group-size", 32, "--symmetric"]
    result = run(tiny_checkpoint, "-o", tmp_path / "e", *options)
    assert result.exit_code == 0, result.output
    manifest = open_engine(tmp_path / "e").manifest
    assert (manifest.limits.max_seq_len, manifest.limits.max_batch_size) == (96, 3)
    assert (manifest.limits.max_num_tokens, kv_dtype_of(manifest.caches)) == (17, "int8")
    assert "onnxruntime MatMulNBits int4, groups of 32" in result.stdout
    assert "--symmetric" in manifest.command


def test_estimate_reads_the_plan_and_writes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run(tiny_checkpoint, "-o", tmp_path / "e", "--estimate", "--max-seq-len", 64)
    assert result.exit_code == 0, result.output
    planned = plan(tiny_checkpoint, BuildOptions(max_seq_len=64))
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines() if line[:1].strip())
    assert rows["weights"].strip() == format_bytes(planned.weight_bytes)
    per_token = format_bytes(bytes_per_token(planned.caches))
    assert rows["KV per token"].strip() == f"{per_token} (float32)"
    assert rows["KV of one sequence"].strip().startswith(format_bytes(planned.sequence_kv_bytes))
    needed = planned.weight_bytes + planned.sequence_kv_bytes + (200 << 20)
    assert rows["memory needed"].strip().startswith(format_bytes(needed))
    assert "slipstream float32" in result.stdout
    assert not (tmp_path / "e").exists()


def test_sizes_of_an_engine_of_ranks_are_of_one_of_them(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """In estimates and reports; each has half of what ranks share."""
    options = ("--max-seq-len", 64, "--target", "cpu")
    one, two = (
        plan(tiny_checkpoint, BuildOptions("cpu", max_seq_len=64, tp_size=n)) for n in (1, 2)
    )
    assert two.weight_bytes < 0.6 * one.weight_bytes
    assert two.sequence_kv_bytes == one.sequence_kv_bytes // 2
    estimate = run(tiny_checkpoint, "--estimate", *options, "--tp-size", 2)
    assert re.search(r"^ranks +2; sizes are of one of them$", estimate.stdout, re.M)
    assert f"  {format_bytes(two.weight_bytes)}\n" in estimate.stdout
    made = run(tiny_checkpoint, "-o", tmp_path / "engine", *options, "--tp-size", 2)
    assert made.exit_code == 0, made.output
    files = {file.name: file.stat().st_size for file in (tmp_path / "engine").iterdir()}
    assert files["weights.safetensors"] == files["weights.rank1.safetensors"]
    report = CliRunner().invoke(slipstream, ["inspect", str(tmp_path / "engine"), "--verify"])
    assert report.exit_code == 0 and "2; sizes are of one of them" in report.output


def test_verbose_logs_the_passes(tiny_checkpoint: Path) -> None:
    quiet, verbose = (run(tiny_checkpoint, "--estimate", *more) for more in ([], ["--verbose"]))
    assert "pass fuse_parallel_linears" not in quiet.stderr
    assert "pass fuse_parallel_linears: " in verbose.stderr
    assert verbose.stdout == quiet.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-o DIRECTORY"),
        (["-o", "e", "--quantization", "int3"], "int3"),
        (["-o", "e", "--group-size", "48"], "group_size is 48; it must be one of 32, 64, 128"),
        (["-o", "e", "--max-seq-len", "0"], "--max-seq-len"),
        (["-o", "e", "--paged-kv-cache"], "--paged-kv-cache"),
    ],
)
def test_bad_usage(tiny_checkpoint: Path, arguments: list[str], message: str) -> None:
    result = run(tiny_checkpoint, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("missing.gguf", [], "does not exist"),
        (None, ["--max-seq-len", "100000"], "max_seq_len is 100000"),
        (None, ["--target", "abacus"], "target 'abacus' is unknown"),
    ],
)
def test_errors_are_one_line(
    tiny_checkpoint: Path, tmp_path: Path, checkpoint: str | None, options: list[str], message: str
) -> None:
    source = tiny_checkpoint if checkpoint is None else tmp_path / checkpoint
    result = run(source, "-o", tmp_path / "e", *options)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "e").exists()


def test_what_is_no_engine_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    result = run(tiny_checkpoint, "-o", tmp_path)
    assert result.exit_code == 1 and "is no engine" in result.stderr
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu"], "--tune is for target cuda and the target is cpu"),
        (["--target", "cuda", "--estimate"], "--tune needs an engine and --estimate makes none"),
    ],
)
def test_tuning_is_refused_before_anything_is_built(
    tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(tiny_checkpoint, "-o", tmp_path / "engine", "--tune", *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu", "--kernels", "sm_90"], "is for target cuda and the target is cpu"),
        (["--target", "cuda", "--kernels", "hopper"], "--kernels is 'hopper'; use auto, none or"),
    ],
)
def test_kernels_are_refused_before_anything_is_built(
    tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(tiny_checkpoint, "-o", tmp_path / "engine", *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "engine").exists()


# The process that compiles, with another compiler: it plans the engine that is built, and what is
# printed on the way is no kernel.
PROCESS = """
from slipstream.server import kernel_process

def compile_plan(plan, capability):
    assert plan.target == "cuda" and plan.weights
    print("some library's words")
    return f"none of {capability}".encode()

kernel_process.compile_plan = compile_plan
kernel_process.main()
"""


@pytest.mark.parametrize(
    ("arguments", "here", "kept"),
    [
        (["--kernels", "sm_100"], None, b"none of (10, 0)"),
        (["--kernels", "sm_80"], None, b"none of (8, 0)"),
        (["--kernels", "none"], (9, 0), None),
        ([], None, None),
        ([], (9, 0), b"none of (9, 0)"),
        (["--quantization", "fp8"], (8, 0), None),
    ],
)
def test_kernels_are_kept_for_the_gpu_that_is_named_or_here(
    arguments: list[str],
    here: tuple[int, int] | None,
    kept: bytes | None,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_kernels, "_PROCESS", [sys.executable, "-P", "-c", PROCESS])
    monkeypatch.setattr(detect, "gpu_capability", lambda: here)
    output = tmp_path / "engine"
    result = run(tiny_checkpoint, "-o", output, "--target", "cuda", *arguments)
    assert result.exit_code == 0, result.output
    engine = open_engine(output)
    engine.verify_files()
    assert ("kernels.zip" in engine.manifest.files) == (kept is not None)
    if kept is not None:
        assert (output / "kernels.zip").read_bytes() == kept


def test_an_engine_whose_kernels_do_not_compile_is_whole(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "raise SystemExit('no assembler')"
    monkeypatch.setattr(engine_kernels, "_PROCESS", [sys.executable, "-c", broken])
    arguments = ("--target", "cuda", "--kernels", "sm_90")
    result = run(tiny_checkpoint, "-o", tmp_path / "engine", *arguments)
    assert result.exit_code == 0 and "keeps no kernels: no assembler" in result.stderr
    assert "kernels.zip" not in open_engine(tmp_path / "engine").manifest.files
