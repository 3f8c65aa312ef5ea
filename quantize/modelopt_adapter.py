"""NVIDIA's nvidia-modelopt behind the interface of our own algorithms: fp8_static, w4a8_awq, nvfp4.

It works on the whole model at once, in bfloat16. Its export is read back by our own importer, so
that its codes come out in the one representation. https://nvidia.github.io/Model-Optimizer/ (0.47)
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.checkpoints.names import layer_of
from slipstream.cores import usable_cores
from slipstream.errors import BuildError, MissingDependencyError
from slipstream.quantize.layer import LayerResult, LinearStats
from slipstream.quantize.options import QuantizeOptions, Scheme
from slipstream.quantize.plan import Plan
from slipstream.quantize.sites import Source, layer_sites
from slipstream.quantize.skeleton import fill, transformers_config
from slipstream.weights.rtn import quantize_rtn
from slipstream.weights.tensor import QuantTensor

log = logging.getLogger(__name__)

Tokens = NDArray[np.int32]
_CONFIGS: Mapping[str, str] = MappingProxyType(
    {"fp8_static": "FP8_DEFAULT_CFG", "w4a8_awq": "W4A8_AWQ_BETA_CFG", "nvfp4": "W4A16_NVFP4_CFG"}
)
_REROUNDED = "modelopt scales its inputs, which nothing before it can do; rounded to nearest"


def quantize_layers(
    checkpoint: Checkpoint,
    plan: Plan,
    tokens: Sequence[Tokens],
    options: QuantizeOptions,
    resume_from: int = 0,
    load_done: Callable[[int], Mapping[str, QuantTensor]] | None = None,
) -> Iterator[LayerResult]:
    """Every layer from ``resume_from`` on, as ``layerwise.quantize_layers`` gives them.

    ``load_done`` is not used: all layers are made again, for the same data the same. Raises
    MissingDependencyError without modelopt.
    """
    seen = sum(map(len, tokens))
    with tempfile.TemporaryDirectory(prefix="slipstream-modelopt-") as directory:
        _export(checkpoint, plan, tokens, Path(directory))
        made = open_checkpoint(directory)
        for layer in plan.layers[resume_from:]:
            yield _Layer(checkpoint, made, plan, layer.index, seen).result()


def _export(checkpoint: Checkpoint, plan: Plan, tokens: Sequence[Tokens], directory: Path) -> None:
    """Calibrates, rounds and stores a model with modelopt."""
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise MissingDependencyError(
            f"{plan.options.qformat} needs nvidia-modelopt, which cannot be imported ({error}); "
            "install it: pip install 'slipstream[modelopt]'"
        ) from error
    # torch knows OMP_NUM_THREADS and no quota.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    model = _model(checkpoint)

    def forward_loop(model: torch.nn.Module) -> None:
        for window in tokens:
            model(torch.from_numpy(np.asarray(window, np.int64))[None])

    config = _config(copy.deepcopy(getattr(mtq, _CONFIGS[_qformat(plan)])), plan)
    with _quiet(), torch.inference_mode():
        mtq.quantize(model, config, forward_loop)
        export_hf_checkpoint(model, export_dir=directory)


def _qformat(plan: Plan) -> str:
    names = {scheme.name for scheme in plan.schemes.values()}
    if len(names) > 1:
        raise BuildError(f"modelopt makes one of {', '.join(sorted(names))} in a run; choose one")
    return names.pop()


def _model(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model in bfloat16, its head apart from its embedding."""
    config = transformers_config(checkpoint.config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        _restore(model, module)
    weights = {name: _bfloat16(checkpoint, name) for name in checkpoint.names()}
    if checkpoint.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    fill(model, weights)
    evaluated: torch.nn.Module = model.eval()
    return evaluated


def _restore(model: Any, module: torch.nn.Module) -> None:  # noqa: ANN401
    """What a module computes with that is no weight, such as rotary frequencies: on the meta device
    it is lost."""
    lost = module._non_persistent_buffers_set
    for name in lost:
        module.register_buffer(name, torch.empty_like(module.get_buffer(name), device="cpu"), False)
    if lost:
        model._init_weights(module)


def _bfloat16(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    values = np.ascontiguousarray(checkpoint.tensor(name).load().dequantize())
    return torch.from_numpy(values).to(torch.bfloat16)


def _config(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """One of modelopt's configurations with the plan's groups and without its dense linears."""
    entries: list[dict[str, Any]] = []
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entries += [_weights(entry, module, scheme) for module, scheme in plan.schemes.items()]
        else:
            entries.append(entry)
    dense = [module for module in plan.linears if module not in plan.schemes]
    entries += [{"quantizer_name": f"{module}.*", "enable": False} for module in dense]
    return {**config, "quant_cfg": entries}


def _weights(entry: dict[str, Any], module: str, scheme: Scheme) -> dict[str, Any]:
    """The entry for one module's weight."""
    own = {**copy.deepcopy(entry), "quantizer_name": f"{module}.weight_quantizer"}
    if scheme.kind == "int":
        own["cfg"][0]["block_sizes"][-1] = scheme.group
    return own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps modelopt's reports off the terminal; its warnings go to the log."""
    sink = io.StringIO()
    with (
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        log.info("modelopt: %s", message)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer of what modelopt ``made`` of a checkpoint."""

    source: Checkpoint
    made: Checkpoint
    plan: Plan
    index: int
    seen: int

    def result(self) -> LayerResult:
        """Its tensors, without scales on inputs: they are folded into what comes before."""
        names = [name for name in self.source.names() if layer_of(name) == self.index]
        tensors = {name: self._tensor(name) for name in names}
        schemes = self.plan.layers[self.index].linears
        errors = {module: self._error(tensors, module) for module in schemes}
        rerounded = self._fold(tensors)
        stats = [
            LinearStats(
                name=module,
                scheme=scheme.name,
                group=scheme.group,
                weight_error=errors[module],
                output_error=None,
                clip=None,
                alpha=None,
                damping=None,
                fallback=_REROUNDED if module in rerounded else None,
                tokens_seen=self.seen,
                bytes=scheme.nbytes(self.plan.shape(module)),
            )
            for module, scheme in schemes.items()
        ]
        return LayerResult(self.index, tensors, tuple(stats), None)

    def _tensor(self, name: str) -> QuantTensor:
        """A tensor of modelopt's; one that it only passed on is taken from the source."""
        tensor = self.made.tensor(name).load()
        module = name.removesuffix(".weight")
        scheme = self.plan.layers[self.index].linears.get(module)
        if scheme is not None:
            return _with_scale_dtype(tensor, scheme)
        source = self.source.tensor(name).load()
        rounded = source.dequantize().astype(tensor.codes.dtype)
        return source if np.array_equal(rounded, tensor.codes) else tensor

    def _error(self, tensors: Mapping[str, QuantTensor], module: str) -> float:
        """|W' - W|² / |W|², the norm's share of a folded scale taken back."""
        name = f"{module}.weight"
        original = self.source.tensor(name).load().dequantize()
        difference = tensors[name].dequantize() * self._folded_norm(tensors, module) - original
        return float(np.square(difference).sum() / max(np.square(original).sum(), 1e-30))

    def _folded_norm(self, tensors: Mapping[str, QuantTensor], module: str) -> NDArray[np.float32]:
        """What modelopt multiplied the norm before a linear by."""
        source = self._source(module)
        name = "" if source is None else f"{self._prefix}{source.name}.weight"
        if source is None or len(tensors[name].format.shape) != 1:
            return np.ones(1, np.float32)
        before = self.source.tensor(name).load().dequantize() + np.float32(source.offset)
        after = tensors[name].dequantize() + np.float32(source.offset)
        ratio = np.ones(len(before), np.float32)
        np.divide(after, before, out=ratio, where=before != 0)
        return ratio

    @property
    def _prefix(self) -> str:
        return f"model.layers.{self.index}."

    def _source(self, module: str) -> Source | None:
        """Where scales of a linear's columns can be folded."""
        name = module.removeprefix(self._prefix)
        (site,) = layer_sites(self.source.config, self.index, [name])
        return site.source

    def _fold(self, tensors: dict[str, QuantTensor]) -> set[str]:
        """Takes the scales of inputs out of ``tensors``; returns the modules rounded anew."""
        rerounded = set()
        for name, tensor in list(tensors.items()):
            if tensor.input is None or tensor.input.scale is None:
                continue
            module = name.removesuffix(".weight")
            before = self._producer(module)
            if before is None:
                tensors[name] = self._rounded(module)
                rerounded.add(module)
            else:
                scale = tensor.input.scale
                tensors[before] = _with_scaled_rows(tensors[before], scale)
                bias = before.replace(".weight", ".bias")
                if bias in tensors:
                    tensors[bias] = _with_scaled_rows(tensors[bias], scale)
                tensors[name] = replace(tensor, input=None)
        return rerounded

    def _producer(self, module: str) -> str | None:
        """The weight whose rows make the columns of a linear's input, one for one."""
        source, columns = self._source(module), self.plan.shape(module)[1]
        name = "" if source is None else f"{self._prefix}{source.name}"
        shape = self.plan.formats[f"{name}.weight"].shape if name else ()
        return f"{name}.weight" if len(shape) == 2 and shape[0] == columns else None

    def _rounded(self, module: str) -> QuantTensor:
        scheme = self.plan.layers[self.index].linears[module]
        assert scheme.kind == "int" and scheme.bits == 4, scheme
        return quantize_rtn(
            self.source.tensor(f"{module}.weight"), bits=4, group_size=scheme.group, symmetric=True
        )


def _with_scale_dtype(tensor: QuantTensor, scheme: Scheme) -> QuantTensor:
    """The tensor with the scales' type that the scheme asks for."""
    assert tensor.scale is not None
    if tensor.format.kind != "int" or tensor.format.dtype == scheme.scale_dtype:
        return tensor
    scale = tensor.scale.astype(scheme.scale_dtype)
    return replace(tensor, scale=scale, format=replace(tensor.format, dtype=scheme.scale_dtype))


def _with_scaled_rows(tensor: QuantTensor, factors: NDArray[np.float32]) -> QuantTensor:
    """Each row (or element of a bias) times a factor."""
    if tensor.format.kind == "dense":
        values = tensor.codes.astype(np.float32)
        values = values * (factors[:, None] if values.ndim == 2 else factors)
        return replace(tensor, codes=values.astype(tensor.codes.dtype))
    assert tensor.scale is not None and tensor.format.rows == 1
    scale = tensor.scale.astype(np.float32) * factors[:, None]
    return replace(tensor, scale=scale.astype(tensor.scale.dtype))
