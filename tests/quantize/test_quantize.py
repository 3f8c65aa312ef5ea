from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.checkpoints.huggingface.writer import DirectoryWriter
from slipstream.errors import (
    BuildError,
    CheckpointError,
    InvalidRequestError,
    MissingDependencyError,
    SlipstreamError,
)
from slipstream.quantize import checks
from slipstream.quantize import quantize as module
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.quantize import LAYERS, MEASURING, Text, quantize
from slipstream.quantize.report.record import Report
from slipstream.runtime.text.tokenizer import Tokenizer

Run = Callable[..., Report]


def text(checkpoint: Checkpoint) -> Text:
    return Text(Tokenizer.from_directory(checkpoint.path).encode)


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Run:
    """Quantizes the tiny checkpoint to ``out``, round to nearest and measured on little text."""
    (tmp_path / "eval.txt").write_text("the quick brown fox jumps over the lazy dog " * 8)

    def quantized(
        source: Path = tiny_checkpoint,
        output: Path = tmp_path / "out",
        resume: bool = False,
        progress: module.Progress | None = None,
        **options: Any,  # noqa: ANN401 - fields differ
    ) -> Report:
        chosen = {"qformat": "int4_wo", "eval_dataset": str(tmp_path / "eval.txt"), **options}
        return quantize(
            source, output, QuantizeOptions(**chosen), text, resume=resume, progress=progress
        )

    return quantized


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "eval.txt")


def files(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def test_the_result_is_a_checkpoint_with_its_report(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = files(tiny_checkpoint)
    stages: list[tuple[str, int, int]] = []
    report = run(progress=lambda *told: stages.append(told))
    source, written = open_checkpoint(tiny_checkpoint), open_checkpoint(tmp_path / "out")
    assert set(written.names()) == set(source.names()) and written.config == source.config
    for name in written.names():
        tensor, dense = written.tensor(name).load(), source.tensor(name).load().dequantize()
        scheme = "int" if name.startswith("model.layers.") and dense.ndim == 2 else "dense"
        assert tensor.format.kind == scheme, name
        error = np.square(tensor.dequantize() - dense).sum() / np.square(dense).sum()
        assert error < (0.02 if scheme == "int" else 1e-30), name
    stored = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert stored["accuracy"]["tokens"] == report.accuracy.tokens  # type: ignore[union-attr]
    assert len(stored["linears"]) == 21 and stored["options"]["qformat"] == "int4_wo"
    assert "int4_wo" in (tmp_path / "out" / "quantization_report.md").read_text()
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(shards) == 4 and 0 < sum(shards) - report.size < 16_000
    assert left_over(tmp_path) == ["out"]
    assert files(tiny_checkpoint) == before
    assert [told for told in stages if told[0] == LAYERS] == [(LAYERS, i, 3) for i in range(4)]
    assert stages[-1] == (MEASURING, 6, 6)


def test_the_report_is_of_the_file_as_written(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from slipstream.quantize.calibration_data import evaluation_windows
    from slipstream.quantize.evaluate import accuracy
    from slipstream.quantize.forward import CheckpointModel

    report = run(kv_cache_dtype="int8")
    assert report.accuracy is not None and report.accuracy.kl_mean > 0
    encode = Tokenizer.from_directory(tiny_checkpoint).encode
    windows = evaluation_windows(encode, tmp_path / "eval.txt", 512)
    source, written = (
        CheckpointModel(open_checkpoint(p)) for p in (tiny_checkpoint, tmp_path / "out")
    )
    found = accuracy(source.logits(windows), written.logits(windows), windows)
    assert found.kl_mean == pytest.approx(report.accuracy.kl_mean, rel=0.2)
    assert found.kl_mean != report.accuracy.kl_mean, "the KV cache was not rounded"


def test_fp8_kv_scales_are_stored(run: Run, tmp_path: Path) -> None:
    run(qformat="fp8", kv_cache_dtype="fp8", calib_size=1, calib_max_seq_length=64)
    scales = open_checkpoint(tmp_path / "out").kv_scales
    assert scales is not None and len(scales.k) == len(scales.v) == 3
    assert all(0 < scale < 1 for scale in (*scales.k, *scales.v))


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_other_layouts(run: Run, tmp_path: Path, layout: str) -> None:
    run(output=tmp_path / "ours")
    run(format=layout)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == layout
    ours, theirs = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "out")
    for name in ours.names():
        mine, other = ours.tensor(name).load(), theirs.tensor(name).load()
        assert np.array_equal(mine.dequantize(), other.dequantize())


def test_too_much_lost_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    cat = "The cat sat on the mat, and the dog jumped over the fox. " * 20
    (tmp_path / "eval.txt").write_text(cat)
    with pytest.raises(BuildError, match=r"perplexity rose by \+.*max_ppl_increase is 0%.*try --"):
        run(max_ppl_increase=0.0)
    assert left_over(tmp_path) == []
    assert run(max_ppl_increase=1000.0).accuracy is not None


def test_a_full_disk_leaves_nothing_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DirectoryWriter.write

    def write(self: DirectoryWriter, index: int, *more: Any) -> Any:  # noqa: ANN401
        if index == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, index, *more)

    monkeypatch.setattr(DirectoryWriter, "write", write)
    with pytest.raises(BuildError, match=r"cannot write .*out: No space left on device; make room"):
        run()
    assert left_over(tmp_path) == []
    with pytest.raises(BuildError, match="No space left"):
        run(resume=True)
    assert left_over(tmp_path) == [".out.quantizing"]
    monkeypatch.undo()
    run(resume=True)
    assert left_over(tmp_path) == ["out"]


def test_too_little_space_is_found_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(BuildError, match=r"would take 0 MiB and .* has 0 MiB free"):
        run()
    assert left_over(tmp_path) == []


class Interruption:
    """Ends a run, as Ctrl-C does, when so many layers are done."""

    def __init__(self, after: int) -> None:
        self.after, self.started = after, -1

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.started < 0:
            self.started = done
        if stage == LAYERS and done == self.after:
            raise KeyboardInterrupt


def test_resuming_makes_only_what_is_missing_and_the_same(run: Run, tmp_path: Path) -> None:
    options = {"qformat": "int4_gptq", "calib_size": 2, "calib_max_seq_length": 64}
    run(output=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(progress=Interruption(2), **options)
    assert left_over(tmp_path) == [".out.quantizing", "whole"]
    watch = Interruption(-1)
    report = run(resume=True, progress=watch, **options)
    assert watch.started == 2 and len(report.linears) == 21
    assert left_over(tmp_path) == ["out", "whole"]
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "out")
    different = {name for name in whole if whole[name] != resumed[name]}
    assert all(name.startswith("quantization_report") for name in different)


def test_resuming_with_other_options_is_refused(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(progress=Interruption(1))
    message = "qformat was 'int4_wo' and is 'int8_wo'; exclude was .*start again without --resume"
    with pytest.raises(BuildError, match=message):
        run(resume=True, qformat="int8_wo", exclude=["re:.*o_proj"])
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    with pytest.raises(BuildError, match=r"checkpoint was .* and is .*other"):
        run(resume=True, source=other)
    assert left_over(tmp_path) == [".out.quantizing", "other"]
    run(resume=True, max_ppl_increase=1000.0)
    assert left_over(tmp_path) == ["other", "out"]


def test_starting_again_drops_what_was_kept(run: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(progress=Interruption(2))
    watch = Interruption(-1)
    run(qformat="int8_wo", progress=watch)
    assert watch.started == 0 and left_over(tmp_path) == ["out"]
    run(resume=True)  # there is nothing to go on with
    assert left_over(tmp_path) == ["out"]


def test_only_a_result_of_ours_is_replaced(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(BuildError, match="out exists and is no quantized checkpoint of"):
        run()
    assert left_over(tmp_path) == ["out"] and (tmp_path / "out" / "precious").exists()
    shutil.rmtree(tmp_path / "out")
    run()
    run(qformat="int8_wo")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tiny_checkpoint)
    for output, message in (
        (tiny_checkpoint / "inside", "inside is in the checkpoint"),
        (tiny_checkpoint, "is or holds the checkpoint"),
        (tmp_path / "link", "is a symbolic link"),
        (tmp_path / "out", r"not part of its quantized checkpoint .*, such as notes\.txt"),
    ):
        with pytest.raises(BuildError, match=message):
            run(output=output)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="quantized already"):
        run(source=tmp_path / "out", output=tmp_path / "twice")


def damage(source: Path, directory: Path) -> Path:
    """A copy whose weights are cut short."""
    copy = shutil.copytree(source, directory)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return copy


def as_pickle(source: Path, directory: Path) -> Path:
    copy = shutil.copytree(source, directory)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    return copy


@pytest.mark.parametrize(
    ("make", "message"),
    [(damage, "is truncated"), (as_pickle, "only as pickles")],
)
def test_bad_checkpoints(
    run: Run,
    tiny_checkpoint: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], Path],
    message: str,
) -> None:
    source = make(tiny_checkpoint, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=message):
        run(source=source)
    assert left_over(tmp_path) == ["bad"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calib_dataset": "EMPTY"}, InvalidRequestError, "is empty"),
        ({"calib_dataset": "missing.txt"}, InvalidRequestError, "cannot be read"),
        ({"eval_dataset": "missing.txt"}, InvalidRequestError, "cannot be read"),
        ({"calib_dataset": "self"}, InvalidRequestError, "needs a model that can generate"),
        ({"exclude": ["re:.*"]}, BuildError, "none would be quantized"),
        (
            {"qformat": "fp8", "format": "gptq"},
            BuildError,
            r"layers\.0\..*cannot be stored as gptq",
        ),
        ({"overrides": ["re:.*o_proj=int8_wo"], "format": "awq"}, BuildError, "o_proj.*as awq"),
        ({"auto_bits": 5.0, "format": "awq"}, BuildError, "holds 4 bits alone"),
        ({"kv_cache_dtype": "fp8", "format": "awq"}, BuildError, "no place for the scales"),
        ({"qformat": "nvfp4", "kv_cache_dtype": "fp8"}, BuildError, "not calibrated together"),
        ({"qformat": "nvfp4", "overrides": ["re:.*o_proj=fp8"]}, BuildError, "cannot be mixed"),
        (
            {"qformat": "fp8", "group_size": 32},
            BuildError,
            "32, for which fp8 has no use",
        ),
        ({"qformat": "int8_sq", "symmetric": False}, BuildError, "for which int8_sq has no use"),
        ({"qformat": "fp8_block", "symmetric": False}, BuildError, "symmetric is False, for which"),
        ({"qformat": "nvfp4", "group_size": 32}, BuildError, "for which nvfp4 has no use"),
        ({"qformat": "int4_wo", "calib_size": 9}, BuildError, "calib_size is 9, for which int4_wo"),
        ({"qformat": "int8_wo", "seed": 9}, BuildError, "seed is 9, for which int8_wo has no use"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[SlipstreamError],
    message: str,
) -> None:
    (tmp_path / "eval.txt").write_text("the cat sat on the mat")
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    if options.get("calib_dataset") == "EMPTY":
        options = {**options, "calib_dataset": str(empty)}
    if "calib_dataset" in options:
        options = {"qformat": "int4_awq", **options}
    monkeypatch.setattr(module, "_quantize_layers", None)
    with pytest.raises(error, match=message):
        run(**options)
    assert left_over(tmp_path) == ["empty.txt"]


def test_a_missing_package_is_named_with_its_remedy(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "modelopt" else name)
    message = r"needs nvidia-modelopt, .*pip install 'slipstream\[modelopt\]'"
    with pytest.raises(MissingDependencyError, match=message):
        run(qformat="nvfp4")
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs torch, .*'slipstream\[quantize\]'"):
        run()
    assert left_over(tmp_path) == []


def test_two_runs_do_not_share_a_place(run: Run, tmp_path: Path) -> None:
    def second(stage: str, done: int, total: int) -> None:
        if (stage, done) == (LAYERS, 1):
            with pytest.raises(BuildError, match="another run is writing"):
                run()

    run(progress=second)
    assert left_over(tmp_path) == ["out"]


def test_tensors_that_nothing_reads_are_left_out_or_refused(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """What repeats the configuration is not written again; of anything else nobody knows what it
    is."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    arrays, extra = load_file(source / "model.safetensors"), np.ones((4, 4), np.float32)
    attention = "model.layers.0.self_attn."
    repeated = {f"{attention}rotary_emb.inv_freq": extra[0]}
    save_file({**arrays, **repeated}, source / "model.safetensors")
    run(source)
    assert set(open_checkpoint(tmp_path / "out").names()) == set(arrays)
    save_file({**arrays, f"{attention}extra.weight": extra}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not read, such as .*self_attn\.extra\.weight"):
        run(source, tmp_path / "other")
