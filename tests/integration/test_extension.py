"""``tests/extension``, a package that is not of Slipstream, installed as pip installs any: its
architecture and its operator are found, built, quantized and run on both targets. Gemma 3 of
transformers is the truth."""

from __future__ import annotations

import dataclasses
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
from tests.builder.checkpoints.gguf.models import tiny as tiny_gguf
from tests.integration import test_cuda_models
from tests.integration.test_architectures import PROMPT_TOKENS, run_in_chunks
from tests.integration.test_cuda_models import distance, logits_in_chunks, reference_logits
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import Gemma3TextConfig

from slipstream.builder.build import build, plan
from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.engine import MANIFEST, Manifest, open_engine
from slipstream.builder.models import load_architecture
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope, RopeScaling
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
PACKAGE, NAME, OPERATOR = "slipstream_gemma3", "Gemma3ForCausalLM", "GatedGELU"
KINDS = [SLIDING, SLIDING, FULL]
ROPES = {
    FULL: {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
CONFIG: dict[str, Any] = {
    **TINY_SHAPE,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 17,
    "layer_types": KINDS,
    "rope_parameters": ROPES,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
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
    values = {**CONFIG, **changes}
    values["num_hidden_layers"] = len(values["layer_types"])
    return save_tiny(Gemma3TextConfig(**values), directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built for a CPU by the command, in a process that knows of the package by pip alone."""
    path = tmp_path_factory.mktemp("engine") / "gemma3"
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
    assert manifest.model["architecture"] == "gemma3_text"


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
    assert config.layer_kinds == tuple(KINDS)
    assert [config.window(layer) for layer in range(3)] == [17, 17, 0]
    assert config.rope(0) == Rope(1e4, 16)
    assert config.rope(2) == Rope(1e5, 16, RopeScaling("linear", 4.0))
    assert ModelConfig.from_huggingface(describe(config)) == config
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "sliding_window_pattern": 4},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_hidden_layers": 7},
    ],
    ids=str,
)
def test_defaults_and_older_files_are_those_of_transformers(raw: dict[str, Any]) -> None:
    ours = ModelConfig.from_huggingface({"architectures": [NAME], **raw})
    theirs = Gemma3TextConfig(**raw).to_dict()
    assert ours == ModelConfig.from_huggingface({**theirs, "architectures": [NAME]})


def test_what_it_does_not_compute_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"final_logit_softcapping is 30\.0; expected none"):
        ModelConfig.from_huggingface({"architectures": [NAME], "final_logit_softcapping": 30.0})
    with pytest.raises(CheckpointError, match="hidden_activation is 'silu'; expected one of gelu"):
        ModelConfig.from_huggingface({"architectures": [NAME], "hidden_activation": "silu"})


def test_names_and_shapes_are_those_of_transformers(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    shapes = load_architecture(NAME).shapes(opened.config)
    assert {name: opened.tensor(name).format.shape for name in opened.names()} == shapes


def test_logits_equal_transformers(checkpoint: Path, engine: Path) -> None:
    assert_equal(run_in_chunks(engine, PROMPTS), reference_logits(checkpoint, PROMPTS, "float32"))


def test_a_tied_head_is_not_scaled(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "checkpoint", layer_types=[FULL], tie_word_embeddings=True)
    build(checkpoint, tmp_path / "engine", BuildOptions())
    expected = reference_logits(checkpoint, PROMPTS, "float32")
    assert_equal(run_in_chunks(tmp_path / "engine", PROMPTS), expected)


def test_each_kind_of_layer_has_its_angles_on_a_gpu(checkpoint: Path) -> None:
    program = plan(checkpoint, BuildOptions(target="cuda")).program
    angles = program.nodes("RotaryAngles")
    assert len(angles) == 2
    frequencies = [node.inputs[1].const_value.numpy() for node in angles]  # type: ignore[union-attr]
    assert not np.array_equal(frequencies[0], frequencies[1])


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about padding
@pytest.mark.usefixtures("uncaptured")
def test_it_runs_on_a_gpu(tmp_path: Path) -> None:
    """A layer of each kind, few tokens, no step of one: the interpreter takes seconds for each."""
    checkpoint = save(tmp_path / "checkpoint", layer_types=[SLIDING, FULL], sliding_window=5)
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


@pytest.mark.slow
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
    assert len(report.linears) == 3 * 7
    assert all(row.fallback is None and row.tokens_seen == 8 * 64 for row in report.linears)
    scaled = {row.name.rpartition(".")[2] for row in report.linears if row.alpha}
    assert scaled >= {"q_proj", "up_proj"}
    manifest = build(tmp_path / "quantized", tmp_path / "engine", BuildOptions())
    assert manifest.quantization == "checkpoint"
    expected = reference_logits(checkpoint, PROMPTS, "float32")
    assert distance(run_in_chunks(tmp_path / "engine", PROMPTS), expected) < 0.35


def test_gguf_files_hold_one_more_than_the_weight(tmp_path: Path) -> None:
    model = tiny_gguf("qwen3")
    stored = model.tensors["blk.0.attn_norm.weight"]
    path = model.write(tmp_path / "m.gguf")
    config = dataclasses.replace(open_checkpoint(path).config, architecture="gemma3_text")
    read = dataclasses.replace(open_checkpoint(path), config=config)  # type: ignore[type-var]
    found = read.tensor("model.layers.0.input_layernorm.weight").load().dequantize()
    np.testing.assert_array_equal(found, stored - np.float32(1))


def rows(tokens: int, width: int) -> NDArray[np.float32]:
    values = np.random.default_rng(width).normal(0, 3, (tokens, 2 * width))
    return np.asarray(values, np.float32)


def reference(gate_up: NDArray[np.float32]) -> NDArray[np.float32]:
    module, _, function = OPERATORS[OPERATOR].reference.partition(":")
    found: NDArray[np.float32] = getattr(import_module(module), function)(gate_up)
    return found


def test_the_reference_is_the_activation_of_transformers() -> None:
    x = rows(3, 40)
    gate, up = torch.from_numpy(x).double().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    np.testing.assert_allclose(reference(x), expected.numpy(), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("width", [1, 7, 16, 65, 576])
def test_its_kernel_on_every_instruction_set(width: int) -> None:
    spec, x = OPERATORS[OPERATOR], rows(5, width)
    for isa in library.isas(spec.native or ""):
        (y,) = native.call(spec, {"gate_up": x}, isa, threads=2)
        np.testing.assert_allclose(y, reference(x), rtol=1e-5, atol=1e-5)
        (alone,) = native.call(spec, {"gate_up": x[2:3]}, isa)
        np.testing.assert_array_equal(alone, y[2:3])


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # whose inverse is 0
@pytest.mark.parametrize("width", [7, 576, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_kernel_on_a_gpu(dtype: torch.dtype, width: int, device: str) -> None:
    x = torch.from_numpy(rows(3, width)).to(device, dtype)
    node = ir.node(OPERATOR, [ir.Value(name="x")], domain=PACKAGE, name="gate")
    (y,) = bind(node, Context({}, Tactics((9, 0), "")))(Run({"x": x}, pdl=False))
    assert y.dtype == dtype
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    want = reference(x.float().cpu().numpy())
    np.testing.assert_allclose(y.float().cpu().numpy(), want, rtol=1.01 * rtol, atol=1e-6)
