"""Gemma 4, whose layers take more than hidden states: quantized, written, read back and built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tests.integration.test_architectures import CHUNKS, GEMMA4, GEMMA4_EXPERTS, run_in_chunks
from tests.tiny_models import save_tiny
from transformers import Gemma4TextConfig

from slipstream.builder.build import build
from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.options import BuildOptions
from slipstream.quantize import forward
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.layerwise import quantize_layers
from slipstream.quantize.options import QFormat, QuantizeOptions
from slipstream.quantize.plan import make_plan
from slipstream.quantize.quantize import Text, quantize
from slipstream.quantize.report import record
from slipstream.quantize.sites import layer_sites
from slipstream.runtime.text.tokenizer import Tokenizer

# Two layers with keys, and one that reads those of the second, with an MLP twice as wide; inputs
# and experts in all of them.
CONFIG = Gemma4TextConfig(
    **GEMMA4
    | GEMMA4_EXPERTS
    | {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
        "num_experts": 3,
        "moe_intermediate_size": 32,
    }
)
RNG = np.random.default_rng(0)
WINDOWS = [RNG.integers(2, 320, 48).astype(np.int32) for _ in range(2)]
FOX = "the quick brown fox jumps over the lazy dog "
SUFFIX = ".weight"
INT8_ACTIVATIONS = 0.05  # what rounding x costs here
FLOAT8_AS_INT8 = 0.03  # and what it costs to hold codes of float8 as 8-bit integers


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Its scores, which are not scaled, are made as small as those of others: they would multiply
    what rounding costs."""
    path = save_tiny(CONFIG, tmp_path_factory.mktemp("gemma4"))
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("q_norm.weight"):
            tensor *= 0.2
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return open_checkpoint(path)


def distance(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Of most tokens: where two experts nearly tie, rounding an input chooses another."""
    errors = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return float(np.median(errors))


@pytest.mark.parametrize("qformat", ["int4_wo", "int4_awq", "int4_gptq", "int8_sq", "fp8"])
def test_what_is_read_back_is_built_and_computes_as_its_weights_say(
    qformat: QFormat, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "find_spec", lambda _: None)  # plots take a second
    (tmp_path / "text.txt").write_text(FOX * 12)
    (tmp_path / "eval.txt").write_text(FOX * 4)
    calibration = {
        "calib_dataset": str(tmp_path / "text.txt"), "calib_size": 2, "calib_max_seq_length": 48
    }  # fmt: skip
    options = QuantizeOptions(
        qformat=qformat,
        eval_dataset=str(tmp_path / "eval.txt"),
        kv_cache_dtype="fp8" if qformat == "fp8" else "auto",
        **({} if qformat == "int4_wo" else calibration),  # type: ignore[arg-type]
    )

    def text(checkpoint: Checkpoint) -> Text:
        return Text(Tokenizer.from_directory(checkpoint.path).encode)

    quantize(source.path, tmp_path / "out", options, text)
    written = open_checkpoint(tmp_path / "out")
    assert written.config == source.config and set(written.names()) == set(source.names())
    for name in written.names():
        form = written.tensor(name).format
        rounded = ".layers." in name and len(form.shape) == 2 and "router" not in name
        assert (form.kind != "dense") == rounded, name
    if qformat == "fp8":
        scales = written.kv_scales
        assert scales is not None and scales.k[0] != scales.k[1]
        assert (scales.k[2], scales.v[2]) == (scales.k[1], scales.v[1])
    build(tmp_path / "out", tmp_path / "engine", BuildOptions(kv_cache_dtype="float32"))
    prompts = np.random.default_rng(0).integers(2, 320, (2, sum(CHUNKS)))
    windows = [prompt.astype(np.int32) for prompt in prompts[:1]]
    (dense,) = CheckpointModel(source).logits(windows)
    monkeypatch.setattr(forward, "round_activations", lambda *_: None)  # kernels have their own way
    (expected,) = CheckpointModel(written).logits(windows)
    assert distance(expected, dense) < (0.5 if qformat.startswith("int4") else 0.2)
    allowed = INT8_ACTIVATIONS + (FLOAT8_AS_INT8 if qformat == "fp8" else 0.0)
    assert distance(run_in_chunks(tmp_path / "engine", prompts)[0], expected) < allowed


def test_a_run_that_goes_on_ends_as_one_that_was_not_cut(source: Checkpoint) -> None:
    """What layers to come read of those that were done is there again."""
    options = QuantizeOptions(qformat="int4_gptq", group_size=32)
    plan = make_plan(source, options)
    whole = list(quantize_layers(source, plan, WINDOWS, options))
    again = quantize_layers(source, plan, WINDOWS, options, 2, lambda i: whole[i].tensors)
    (last,) = again
    for name, tensor in whole[2].tensors.items():
        np.testing.assert_array_equal(last.tensors[name].codes, tensor.codes, err_msg=name)


def test_scales_are_folded_where_each_layer_has_its_own_shapes(source: Checkpoint) -> None:
    """The MLP that is twice as wide where keys are those of another layer, experts in their own."""
    for layer, width in ((1, 128), (2, 256)):
        prefix = f"model.layers.{layer}."
        names = [n.removeprefix(prefix) for n in source.names() if n.startswith(prefix)]
        linears = [n.removesuffix(SUFFIX) for n in names if n.endswith(f"proj{SUFFIX}")]
        sites = {site.key: site for site in layer_sites(source.config, layer, linears)}
        down = sites["mlp.down_proj"].source
        assert down is not None and (down.name, down.extent.length) == ("mlp.up_proj", width)
        expert = sites["experts.1.down_proj"]
        assert expert.source is not None and expert.source.name == "experts.1.up_proj"
        assert expert.stream == "post_feedforward_layernorm_2"
        assert sites["experts.1.gate_proj"].linears == (
            "experts.1.gate_proj", "experts.1.up_proj"
        )  # fmt: skip
        assert sites["self_attn.q_proj"].linears == tuple(
            f"self_attn.{x}_proj" for x in ("qkv" if layer == 1 else "q")
        )


def test_inputs_of_layers_take_memory(source: Checkpoint) -> None:
    plan = make_plan(source, QuantizeOptions(qformat="int4_gptq"))
    tokens = plan.options.calib_size * plan.options.calib_max_seq_length
    per_token = 3 * 64 + 3 * 32  # hidden states, and an input of each layer
    assert 0 < plan.memory - 4 * tokens * per_token < 4 * tokens * 32
