"""``tests/extension``, a package that is not of Slipstream, installed as pip installs any: its
architecture and its operator are found, built, quantized and run on both targets. Arcee of
transformers is the truth."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from tests.integration import test_cuda_models
from tests.integration.test_architectures import PROMPT_TOKENS, run_in_chunks
from tests.integration.test_cuda_models import distance, logits_in_chunks, reference_logits
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import ArceeConfig
from transformers.activations import ACT2FN

from slipstream.builder.build import build
from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.engine import MANIFEST, Manifest, open_engine
from slipstream.builder.models import load_architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.huggingface_config import describe
from slipstream.builder.options import BuildOptions
from slipstream.errors import CheckpointError, EngineMismatchError
from slipstream.extensions import entry_points
from slipstream.plugins import library, native
from slipstream.plugins.cuda.binding import Context, Run, bind
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.operators import OPERATORS
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.quantize import Text, quantize
from slipstream.runtime.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PACKAGE, NAME, OPERATOR = "slipstream_arcee", "ArceeForCausalLM", "SquaredRelu"
CONFIG: dict[str, Any] = {**TINY_SHAPE, "attention_bias": True, "mlp_bias": True}
PROMPTS = np.random.default_rng(0).integers(0, TINY_SHAPE["vocab_size"], (2, PROMPT_TOKENS))
uncaptured = test_cuda_models.uncaptured


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed the package, from a copy, which it builds in; without a network."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("extension")
    source = shutil.copytree(ROOT / "tests" / "extension", folder / "source")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    done = python(*pip, *flags, str(source))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "site"


@pytest.fixture(autouse=True, scope="module")
def installed(site: Path) -> Iterator[None]:
    """The package is installed for this process, too, until the last test of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        entry_points.cache_clear()
        yield
    entry_points.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[module]


def save(directory: Path, **changes: Any) -> Path:  # noqa: ANN401 - keys of config.json
    return save_tiny(ArceeConfig(**{**CONFIG, **changes}), directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("arcee"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built for a CPU by the command, in a process that knows of the package by pip alone."""
    path = tmp_path_factory.mktemp("engine") / "arcee"
    done = slipstream("build", str(checkpoint), "-o", str(path), "--target", "cpu", site=site)
    assert done.returncode == 0, done.stderr
    return path


def python(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(part) for part in (ROOT / "src", site) if part is not None)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def slipstream(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-c", "from slipstream.server.cli import main; main()", *arguments, site=site)


def assert_equal(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


def test_an_engine_names_the_operator_and_its_version(engine: Path) -> None:
    manifest = Manifest.from_dict(json.loads((engine / MANIFEST).read_text()))
    assert manifest.plugins[OPERATOR] == 1
    assert manifest.model["architecture"] == "arcee"


def test_without_the_package_nothing_is_built_or_run(checkpoint: Path, engine: Path) -> None:
    built = slipstream("build", str(checkpoint), "-o", str(engine.parent / "other"))
    assert built.returncode != 0
    assert f"architecture {NAME} is not supported" in " ".join(built.stderr.split())
    assert "install a package that adds it" in " ".join(built.stderr.split())
    run = slipstream("generate", str(engine), "the")
    assert run.returncode != 0
    said = " ".join(run.stderr.split())
    assert f"needs version 1 of operator {OPERATOR}" in said
    assert "has none; install the package that brings it; build it again: slipstream build" in said


def test_another_version_of_the_package_is_refused(engine: Path, tmp_path: Path) -> None:
    shutil.copytree(engine, tmp_path / "engine")
    raw = json.loads((engine / MANIFEST).read_text())
    raw["plugins"][OPERATOR] = 2
    (tmp_path / "engine" / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(EngineMismatchError, match=rf"needs version 2 of operator {OPERATOR} .* 1;"):
        open_engine(tmp_path / "engine")


def test_the_configuration_is_read_and_written(checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    assert (config.attention_bias, config.o_bias, config.mlp_bias) == (True, True, True)
    assert ModelConfig.from_huggingface(describe(config)) == config
    assert ModelConfig.from_json(config.to_json()) == config


def test_defaults_are_those_of_transformers() -> None:
    ours = ModelConfig.from_huggingface({"architectures": [NAME]})
    assert ours == ModelConfig.from_huggingface(
        {**ArceeConfig().to_dict(), "architectures": [NAME]}
    )


def test_what_it_does_not_compute_is_refused() -> None:
    with pytest.raises(CheckpointError, match="hidden_act is 'silu', but only 'relu2' is"):
        ModelConfig.from_huggingface({"architectures": [NAME], "hidden_act": "silu"})


def test_names_and_shapes_are_those_of_transformers(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    shapes = load_architecture(NAME).shapes(opened.config)
    assert {name: opened.tensor(name).format.shape for name in opened.names()} == shapes


def test_logits_equal_transformers(checkpoint: Path, engine: Path) -> None:
    assert_equal(run_in_chunks(engine, PROMPTS), reference_logits(checkpoint, PROMPTS, "float32"))


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about padding
@pytest.mark.usefixtures("uncaptured")
def test_it_runs_on_a_gpu(tmp_path: Path) -> None:
    """One layer, few tokens, no step of one: the interpreter takes seconds for each."""
    checkpoint = save(tmp_path / "checkpoint", num_hidden_layers=1)
    manifest = build(checkpoint, tmp_path / "engine", BuildOptions(target="cuda"))
    assert manifest.plugins[OPERATOR] == 1
    prompts = PROMPTS[:, :12]
    exact, theirs = (reference_logits(checkpoint, prompts, d) for d in ("float32", "bfloat16"))
    ours = logits_in_chunks(tmp_path / "engine", prompts, chunks=(9, 3))
    assert distance(ours, exact) < 1.5 * distance(theirs, exact) + 1e-3


def test_quantization_runs_the_same_model(checkpoint: Path) -> None:
    """What calibrates and measures it, which runs the layers of transformers one by one."""
    logits = np.concatenate([*CheckpointModel(open_checkpoint(checkpoint)).logits([*PROMPTS])])
    expected = reference_logits(checkpoint, PROMPTS, "float32")
    assert_equal(logits.reshape(expected.shape), expected)


def test_it_is_quantized_and_built_again(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    options = QuantizeOptions(
        qformat="int4_awq",
        calib_dataset=str(tmp_path / "text.txt"),
        calib_size=8,
        calib_max_seq_length=64,
        eval_dataset=str(tmp_path / "text.txt"),
        group_size=32,
    )

    def text(checkpoint: Checkpoint) -> Text:
        return Text(Tokenizer.from_directory(checkpoint.path).encode)

    report = quantize(checkpoint, tmp_path / "quantized", options, text)
    assert len(report.linears) == 3 * 6
    assert all(row.fallback is None and row.tokens_seen == 8 * 64 for row in report.linears)
    scaled = {row.name.rpartition(".")[2] for row in report.linears if row.alpha}
    assert scaled >= {"q_proj", "up_proj"}
    manifest = build(tmp_path / "quantized", tmp_path / "engine", BuildOptions())
    assert manifest.quantization == "checkpoint"
    expected = reference_logits(checkpoint, PROMPTS, "float32")
    assert distance(run_in_chunks(tmp_path / "engine", PROMPTS), expected) < 0.35


def rows(tokens: int, width: int) -> NDArray[np.float32]:
    values = np.random.default_rng(width).normal(0, 3, (tokens, width))
    return np.asarray(values, np.float32)


def reference(x: NDArray[np.float32]) -> NDArray[np.float32]:
    module, _, function = OPERATORS[OPERATOR].reference.partition(":")
    found: NDArray[np.float32] = getattr(import_module(module), function)(x)
    return found


def test_the_reference_is_the_activation_of_transformers() -> None:
    x = rows(3, 40)
    expected = ACT2FN["relu2"](torch.from_numpy(x).double())
    np.testing.assert_allclose(reference(x), expected.numpy(), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("width", [1, 7, 16, 65, 576])
def test_its_kernel_on_every_instruction_set(width: int) -> None:
    spec, x = OPERATORS[OPERATOR], rows(5, width)
    for isa in library.isas(spec.native or ""):
        (y,) = native.call(spec, {"x": x}, isa, threads=2)
        np.testing.assert_allclose(y, reference(x), rtol=1e-6)
        (alone,) = native.call(spec, {"x": x[2:3]}, isa)
        np.testing.assert_array_equal(alone, y[2:3])


@pytest.mark.kernel
@pytest.mark.parametrize("width", [7, 576, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_kernel_on_a_gpu(dtype: torch.dtype, width: int, device: str) -> None:
    x = torch.from_numpy(rows(3, width)).to(device, dtype)
    node = ir.node(OPERATOR, [ir.Value(name="x")], domain=PACKAGE, name="activation")
    (y,) = bind(node, Context({}, Tactics((9, 0), "")))(Run({"x": x}, pdl=False))
    assert y.dtype == dtype
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    want = reference(x.float().cpu().numpy())
    np.testing.assert_allclose(y.float().cpu().numpy(), want, rtol=1.01 * rtol, atol=1e-6)
