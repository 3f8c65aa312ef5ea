"""Engines of real shapes with random weights, made on the GPU: nothing is read or written, but for
several ranks, each of which reads a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.builder import build as build_module
from slipstream.builder.build import (
    Compiler,
    Plan,
    compile_checkpoint,
    manifest_of,
    write_engine,
)
from slipstream.builder.checkpoints.huggingface.head import HeadCheckpoint
from slipstream.builder.contract import TARGET_GRAPH, page_size_of
from slipstream.builder.graph.program import StoredWeight
from slipstream.builder.head import HeadModel
from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.eagle3 import (
    ARCHITECTURE,
    BEFORE_FC,
    BEFORE_RESIDUAL,
    DRAFT_VOCAB,
    FC_NORM,
    FIRST,
    NORM_OUTPUT,
    NUM_STATES,
    OWN_EMBEDDING,
    TARGET_SIZE,
)
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.expert_linear.cuda import bind as expert_module
from slipstream.plugins.expert_linear.cuda.experts import Experts
from slipstream.plugins.linear.cuda.packing import (
    EXPONENTS,
    Section,
    format_of,
    in_words,
    packed_size,
    sections,
)
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

# With random codes, weights of a size of 0.02; of float4 an exponent, 2**-7.
_SCALES = {"float8_e4m3": 1e-4, "int4": 0.004, "int8": 2e-4, "float4_e2m1": 120}
_LOOKUPS = ("Embedding", "EmbeddingShard")
_PRODUCTS = ("Linear", "NormedRouter", "ExpertLinear", *_LOOKUPS)
_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """The names and shapes of a model; its weights have no values."""

    config: ModelConfig
    mxfp4: bool = False  # so are its experts
    path: Path = Path("random")
    kv_scales: None = None
    pooling: None = None

    def names(self) -> tuple[str, ...]:
        """Every weight of its architecture."""
        return tuple(architecture_of(self.config.architecture).shapes(self.config))

    def tensor(self, name: str) -> LazyTensor:
        """A weight of the right shape that cannot be read."""
        shape = self.config.weight_shape(name)
        assert shape is not None
        fmt = WeightFormat(shape, "dense", "bfloat16")
        if self.mxfp4 and ".experts." in name and len(shape) == 2:
            fmt = WeightFormat(shape, "float4_e2m1", EXPONENTS, 4, 32)
        return LazyTensor(name, fmt, _unreadable)

    def write_tokenizer(self, directory: Path) -> None:
        """Every token has a name."""
        _vocabulary(self.config.vocab_size).save(str(directory / "tokenizer.json"))


def _unreadable() -> QuantTensor:
    raise AssertionError("the weights of a random checkpoint are made on the GPU")


def random_plan(shape: dict[str, Any], options: BuildOptions, *, head: bool = False) -> Plan:
    """The compiled program of a model of this ``config.json``, with an EAGLE-3 ``head`` or none."""
    config = ModelConfig.from_huggingface(shape)
    mxfp4 = "quantization_config" in shape
    made = random_head(config) if head else None
    with patch.object(build_module, "head_for", lambda *_: made):
        return compile_checkpoint(RandomCheckpoint(config, mxfp4), options)


def random_head(target: ModelConfig) -> HeadModel:
    """A head of one layer like those of a model, that knows a quarter of its tokens, as those do
    that SpecForge and speculators make; its weights have no values."""
    known = min(32000, target.vocab_size)
    extras = {
        DRAFT_VOCAB: known, TARGET_SIZE: target.hidden_size, NUM_STATES: 3, BEFORE_RESIDUAL: False,
        BEFORE_FC: False, FC_NORM: False, NORM_OUTPUT: False, OWN_EMBEDDING: False, FIRST: False,
    }  # fmt: skip
    config = replace(target, num_layers=1, tie_word_embeddings=False, extras=extras)
    shapes = ARCHITECTURE.shapes(config)
    tensors = {
        name: LazyTensor(name, WeightFormat(shape, "dense", "bfloat16"), _unreadable)
        for name, shape in shapes.items()
    }
    tokens = np.linspace(0, target.vocab_size - 1, known).astype(np.int32)
    checkpoint = HeadCheckpoint(Path("random"), config, tensors, None, tokens, None)
    layers = target.num_layers
    return HeadModel(checkpoint, "random", (2, layers // 2, layers - 3))


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that rows are multiplied with, or taken from: of ``experts`` each token has
    ``top_k``."""

    name: str
    op_type: str
    format: WeightFormat
    experts: int = 1
    top_k: int = 1

    def read(self, tokens: int) -> float:
        """Bytes that a step of so many tokens must read if each chooses among all experts alike;
        the rows of an embedding do not count."""
        chosen = 1 - (1 - self.top_k / self.experts) ** tokens
        return 0.0 if self.op_type in _LOOKUPS else packed_size(self.format) * chosen

    @property
    def products(self) -> int:
        """Multiplications for each token."""
        rows, columns = self.format.shape
        return 0 if self.op_type in _LOOKUPS else rows // self.experts * self.top_k * columns


def matrices(plan: Plan, graphs: Sequence[str] = (TARGET_GRAPH,)) -> Iterator[Matrix]:
    """The weights of lowered programs, in the order of their use."""
    for node in [node for name in graphs for node in plan.programs[name].graph]:
        if node.op_type in _PRODUCTS:
            blob = node.inputs[1]
            assert blob is not None and blob.name is not None
            values = {a.name: a.value for a in node.attributes.values()}
            fmt = format_of({"zero_kind": 0, "scale_bytes": 4, **values})
            experts, top_k = int(values.get("experts", 1)), 1
            if node.op_type == "ExpertLinear":
                top_k = int(values["top_k"])
            rows, columns = fmt.shape
            fmt = replace(fmt, shape=(experts * rows, columns))
            yield Matrix(blob.name, node.op_type, fmt, experts, top_k)


def random_weights(plan: Plan, device: str = "cuda", seed: int = 0) -> dict[str, Tensor]:
    """Every stored array by name, with values of a healthy size; those of routers spread tokens
    over all experts."""
    torch.manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for matrix in matrices(plan, tuple(plan.programs)):
        if matrix.name not in weights:
            weights[matrix.name] = random_blob(matrix.format, device)
    for weight in plan.weights:
        for part in weight.parts:
            if str(part.dtype) == "int32":  # what a rank has of all
                weights[part.name] = torch.zeros(part.shape, dtype=torch.int32, device=device)
            elif part.name not in weights:  # norms, biases and sinks
                norm = "norm" in part.name
                vector = torch.ones(part.shape) if norm else 0.02 * torch.randn(part.shape)
                weights[part.name] = vector.to(device, _DTYPES[str(part.dtype)])
    return weights


def random_blob(fmt: WeightFormat, device: str) -> Tensor:
    """A packed matrix of random numbers of a healthy size."""
    blob = torch.zeros(packed_size(fmt), dtype=torch.uint8, device=device)
    for name, section in sections(fmt).items():
        part = blob[section.start : section.start + section.nbytes]
        part.copy_(_random_section(name, section, fmt, device).view(torch.uint8).reshape(-1))
    return blob


def _random_section(name: str, section: Section, fmt: WeightFormat, device: str) -> Tensor:
    if name == "zero":
        middle = 2 ** (fmt.bits - 1)
        return torch.full(section.shape, middle, dtype=torch.uint8, device=device)
    if name != "codes":
        kind = fmt.kind if fmt.kind != "int" else f"int{fmt.bits}"
        value = 1.0 if name == "input_scale" else _SCALES[kind]
        scales = torch.full(section.shape, value, dtype=_DTYPES[section.dtype], device=device)
        if fmt.kind == "int":  # codes are below zero on average, and rows are not to be alike
            scales *= torch.randint(0, 2, section.shape, device=device).to(scales.dtype) * 2 - 1
        return scales
    if in_words(fmt):
        return torch.randint(-(2**31), 2**31 - 1, section.shape, dtype=torch.int32, device=device)
    wide = torch.randn(section.shape, dtype=torch.bfloat16, device=device)
    if fmt.kind == "float8_e4m3":
        return (wide * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (wide * 0.02).to(_DTYPES[fmt.dtype])


def random_engine(
    plan: Plan,
    tactics: Path | None = None,
    **runtime: Any,  # noqa: ANN401 - fields differ
) -> LoadedEngine:
    """A loaded engine of a model with random weights; every token of its vocabulary has a name."""
    manifest = manifest_of(plan, {}, "random", "random")
    limits, device = plan.limits, "cpu" if interpreting() else "cuda"
    config = RuntimeConfig().override(
        {
            "max_batch_size": limits.max_batch_size,
            "max_num_tokens": limits.max_num_tokens,
            "max_seq_len": limits.max_seq_len,
            "page_size": page_size_of(plan.caches),
            **runtime,
        }
    )
    head = plan.head_program
    executor = CUDAExecutor.from_weights(
        manifest,
        config,
        plan.program.graph,
        random_weights(plan, device),
        tactics,
        head=None if head is None else head.graph,
    )
    vocab_size = plan.checkpoint.config.vocab_size
    return LoadedEngine(
        executor=executor,
        tokenizer=named_tokens(vocab_size),
        config=config,
        caches=plan.caches,
        vocab_size=vocab_size,
        generation_defaults=SamplingParams(temperature=0),
        fingerprint="fp_random",
        interactive_defaults=SamplingParams(temperature=0),
    )


def write_random_engine(plan: Plan, directory: Path, compiler: Compiler | None = None) -> None:
    """Write an engine of random weights, one for all layers and ranks, into an empty directory."""
    made: dict[WeightFormat, NDArray[np.uint8]] = {}
    formats = {matrix.name: matrix.format for matrix in matrices(plan)}
    for fmt in dict.fromkeys(formats.values()):
        made[fmt] = random_blob(fmt, "cuda").cpu().numpy()
    for program in (plan.program, *plan.others):
        for name, weight in program.stored.items():
            (part, *_) = weight.parts
            packed = formats.get(part.name)
            array = small_array(weight) if packed is None else made[packed]
            program.stored[name] = replace(weight, load=partial(_same, array))
    write_engine(plan, directory, "random", str(directory), compiler=compiler)


def small_array(weight: StoredWeight) -> NDArray[Any]:
    """What is no matrix: ones in a norm, else small random numbers; what says which part of all a
    rank has is true."""
    (part, *_) = weight.parts
    if str(part.dtype) == "int32":
        (array,) = weight.load()
        return array
    vector = torch.ones(part.shape) if "norm" in part.name else 0.02 * torch.randn(part.shape)
    return vector.numpy().astype(part.dtype)


def _same(array: NDArray[Any]) -> tuple[NDArray[Any]]:
    return (array,)


class Routes:
    """What the experts of captured decodes were told to multiply, read after a step has run."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._ids: dict[int, list[Tensor]] = {}
        multiply = expert_module.multiply  # type: ignore[attr-defined]

        def kept(x: Tensor, experts: Experts, ids: Tensor, *more: Any, **options: Any) -> Tensor:  # noqa: ANN401
            if torch.cuda.is_current_stream_capturing() and experts.gated:  # once a layer
                self._ids.setdefault(len(ids), []).append(ids)  # no later kernel gets its memory
            return multiply(x, experts, ids, *more, **options)

        expert_module.multiply = kept  # type: ignore[attr-defined]

    def distinct(self, tokens: int) -> float | None:
        """Different experts a layer in the last decode of so many tokens; None where there are no
        experts. Of steps of one size, decodes are captured first."""
        decode = self._ids.get(tokens, [])[: self._layers]
        found = [torch.unique(ids).numel() for ids in decode]
        return sum(found) / len(found) if found else None


def named_tokens(vocab_size: int) -> Tokenizer:
    """A tokenizer that calls token 17 ``t17``."""
    return Tokenizer(_vocabulary(vocab_size), TokenizerSettings({}))


def _vocabulary(size: int) -> tokenizers.Tokenizer:
    model = tokenizers.models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0")
    return tokenizers.Tokenizer(model)
