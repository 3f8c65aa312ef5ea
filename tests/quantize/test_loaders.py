"""What `quantize` writes, loaded by transformers and by us: in the widths of a real small model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.builder.checkpoints.quantized.test_writers import make
from tests.tiny_models import TINY_SHAPE, llama_tensors, save_llama, save_tiny
from transformers import MixtralConfig

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.checkpoints.huggingface.writer import DirectoryWriter
from slipstream.quantize.checks import layout_of
from slipstream.quantize.options import SCHEMES, QuantizeOptions, Scheme
from slipstream.quantize.plan import Plan, make_plan
from slipstream.weights.tensor import QuantTensor, numpy_dtype

pytest.importorskip("compressed_tensors")

# SmolLM2-135M's: 128 divides neither the width nor the rows of any of its linears but two.
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 1,
}
TOKENS = np.arange(3, 60)
PLAIN, DENSE = "transformers", "transformers, dequantize=True"
# One qformat for each kind of file: how codes are found does not show in it.
KINDS = {replace(scheme, name="", algorithm="rtn"): name for name, scheme in SCHEMES.items()}
# Options, and which loaders do not take what they make.
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    **{qformat: ({"qformat": qformat}, set()) for qformat in KINDS.values()},
    "zero points": ({"symmetric": False}, {PLAIN}),
    "groups of 64 and 128": ({"group_size": 128}, {DENSE}),
    "whole rows": ({"group_size": -1}, set()),
    "dense linears": ({"exclude": ["re:.*o_proj"]}, set()),
    "two schemes": ({"overrides": ["re:.*down_proj=fp8"]}, {DENSE}),
    "torn siblings": ({"overrides": ["re:.*k_proj=int8_wo"]}, {DENSE, "vLLM"}),
}


# Mixtral's experts, and what they are made with; in two ways each, which loaders take the files.
EXPERT_CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "int4": ({"qformat": "int4_wo", "group_size": 32}, set()),
    "fp8": ({"qformat": "fp8"}, set()),
    "fp8_block": ({"qformat": "fp8_block"}, {PLAIN, DENSE}),
    "int8_sq": ({"qformat": "int8_sq"}, {PLAIN, DENSE}),
    "zero points": ({"qformat": "int4_wo", "group_size": 32, "symmetric": False}, {PLAIN, DENSE}),
    "two schemes": (
        {"qformat": "int4_wo", "group_size": 32, "overrides": ["re:.*self_attn.*=int8_wo"]},
        {PLAIN, DENSE},
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("loaders") / "source"
    return open_checkpoint(save_llama(directory, llama_tensors(**SHAPE), **SHAPE))


def quantized(name: str, scheme: Scheme, shape: tuple[int, int]) -> QuantTensor:
    """Random codes of a scheme, with scales that keep numbers of a healthy size."""
    form = scheme.weight_format(shape)
    keys = ("kind", "bits", "group", "zero", "rows", "activation", "dtype")
    tensor = make(name, shape, {key: getattr(form, key) for key in keys})
    assert tensor.scale is not None
    size = float(tensor.dequantize().std())
    if tensor.scale2 is not None:
        return replace(tensor, scale2=tensor.scale2 / np.float32(10 * size))
    scale = tensor.scale.astype(np.float32) / (10 * size)
    return replace(tensor, scale=scale.astype(numpy_dtype(form.dtype)))


def write(source: Checkpoint, plan: Plan, directory: Path) -> dict[str, str]:
    """A checkpoint as a plan has it; gives back what the layout says of other loaders."""
    directory.mkdir()
    writer = DirectoryWriter(directory, layout_of(plan), 1)
    tensors = []
    for name in source.names():
        scheme = plan.schemes.get(module := name.removesuffix(".weight"))
        dense = source.tensor(name).load()
        tensors.append(quantized(name, scheme, plan.shape(module)) if scheme else dense)
    writer.write(0, tensors)
    writer.describe(source, kv_scales=False)
    source.write_tokenizer(directory)
    return dict(writer.layout.loaders(writer.modules))


def ours(directory: Path, rounded: Any) -> NDArray[np.float32]:  # noqa: ANN401 - a function of torch
    """Logits of our importer's weights, the inputs of linears rounded by ``rounded``."""
    from slipstream.quantize import forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "round_activations", rounded)
        model = forward.CheckpointModel(open_checkpoint(directory))
        return np.concatenate(list(model.logits([TOKENS])))


def theirs(directory: Path, loader: str) -> NDArray[np.float32]:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    given = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(directory, **(given if loader == DENSE else {}))
    with torch.inference_mode():
        found = model(torch.from_numpy(TOKENS)[None]).logits[0].float().numpy()
    return np.asarray(found, np.float32)


def as_compressed_tensors(plan: Plan) -> Any:  # noqa: ANN401 - a function of torch
    """How its layers round what comes in: integers at largest / 127.5, float8 at largest / 448."""
    from slipstream.quantize.activations import round_activations, round_fp8

    def hook(linear: torch.nn.Linear, weight: Any) -> Any:  # noqa: ANN401
        scheme = plan.schemes.get(weight.name.removesuffix(".weight"))

        def round_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            x = inputs[0]
            largest = x.abs().amax(-1, keepdim=True)
            if scheme is not None and scheme.float8_inputs:
                return round_fp8(x, largest / 448)
            return (x / (largest / 127.5)).round().clamp(-128, 127) * (largest / 127.5)

        if scheme is not None and (scheme.float8_inputs or scheme.name == "int8_sq"):
            return linear.register_forward_pre_hook(round_input)
        return round_activations(linear, weight)

    return hook


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_the_report_says_with_the_same_logits(
    case: str, source: Checkpoint, tmp_path: Path
) -> None:
    options, refusing = CASES[case]
    plan = make_plan(source, QuantizeOptions(**options))
    loaders = write(source, plan, tmp_path / "out")
    assert {name for name, why in loaders.items() if why} == refusing
    bfloat16 = case == "nvfp4"  # it is decoded in that type, whatever the model's is
    if bfloat16:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    rounded = {PLAIN: as_compressed_tensors(plan), DENSE: lambda linear, weight: None}
    # With dequantize=True it decodes in the type of the scales, mostly float16.
    allowed = dict.fromkeys((PLAIN, DENSE), 0.02) if bfloat16 else {PLAIN: 1e-6, DENSE: 1e-3}
    for loader in (PLAIN, DENSE):
        wanted = ours(tmp_path / "out", rounded[loader])
        try:
            found = theirs(tmp_path / "out", loader)
        except RuntimeError:
            assert loader in refusing
        else:
            loaded = np.abs(found - wanted).max() <= allowed[loader] * np.abs(wanted).max()
            assert loaded == (loader not in refusing)


def outside_experts(linear: torch.nn.Linear, weight: Any) -> Any:  # noqa: ANN401
    """Experts are stacked, and what they read is not rounded."""
    from slipstream.quantize.activations import round_activations

    return None if ".experts." in weight.name else round_activations(linear, weight)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    shape = {**TINY_SHAPE, "num_hidden_layers": 1}
    config = MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    return open_checkpoint(save_tiny(config, tmp_path_factory.mktemp("loaders") / "mixtral"))


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")
@pytest.mark.parametrize("case", EXPERT_CASES)
def test_transformers_stacks_the_experts_that_the_report_says(
    case: str, mixtral: Checkpoint, tmp_path: Path
) -> None:
    options, refusing = EXPERT_CASES[case]
    plan = make_plan(mixtral, QuantizeOptions(**options))
    loaders = write(mixtral, plan, tmp_path / "out")
    assert {name for name in (PLAIN, DENSE) if loaders[name]} == refusing
    rounded = {PLAIN: outside_experts, DENSE: lambda linear, weight: None}
    for loader in {PLAIN, DENSE} - refusing:
        wanted, found = ours(tmp_path / "out", rounded[loader]), theirs(tmp_path / "out", loader)
        # Experts are decoded in the type of the scales, mostly float16.
        assert np.abs(found - wanted).max() <= 2e-3 * np.abs(wanted).max()
    for loader in refusing & {PLAIN, DENSE} if case != "two schemes" else ():
        with pytest.raises(RuntimeError):
            theirs(tmp_path / "out", loader)
