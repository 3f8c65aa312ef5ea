"""The ``quantization_config`` of compressed-tensors: which scheme a module has.

Keys: https://github.com/vllm-project/compressed-tensors (versions up to 0.20).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slipstream.errors import CheckpointError

_DENSE = "pass the unquantized checkpoint it was made from, with --quantization or `quantize`"
# Spellings of `format` that are read; the tensors of a module say which of them it has.
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
)
# What older files or files in memory say; there, too, the tensors decide.
_VAGUE = ("fakequant", "int_quantized", "None")
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "marlin-24": "weights with 2:4 sparsity, permuted for one GPU kernel",
        "sparse-24-bitmask": "weights with 2:4 sparsity as bit masks",
        "sparse-bitmask": "sparse weights as bit masks",
        "mxfp6-pack-quantized": "float6 weights, which no kernel of ours holds",
    }
)
_ONLINE = ("input", "output", "q_attn", "k_cache")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A config group: the arguments of weights and of what goes in and out of a module.

    They are as config.json has them: num_bits, type, strategy, group_size, block_structure,
    symmetric, dynamic.
    """

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The schemes, the modules without one, and the type of the KV cache (None: not quantized)."""

    path: Path
    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]
    kv_cache: Mapping[str, Any] | None = None
    notes: dict[str, None] = field(default_factory=dict)

    def ignores(self, module: str) -> bool:
        """Whether ``ignore`` names it, exactly or by ``re:``."""
        return any(_matches(target, module) for target in self.ignore)

    def scheme(self, module: str) -> Scheme | None:
        """The scheme that targets a module: by its name, else by ``re:``, else by its class."""
        for test in (_is_name, _is_pattern, _is_class):
            for scheme in self.schemes:
                if any(test(target, module) for target in scheme.targets):
                    return scheme
        return None

    def scheme_of_quantized(self, module: str) -> Scheme:
        """The scheme of a module that has quantized tensors, whatever ``ignore`` says of it."""
        scheme = self.scheme(module)
        if scheme is None and len(self.schemes) == 1:
            scheme = self.schemes[0]
            self.note(f"config_groups does not target {module}, which is quantized; its only group")
        if scheme is None:
            raise CheckpointError(
                f"{self.path}: {module} has quantized tensors, but no target of config_groups "
                "names it, so that its bits are unknown; config.json and weights are of different "
                "models: download both again"
            )
        return scheme

    def note(self, sentence: str) -> None:
        """Remember something to tell, once."""
        self.notes[sentence] = None


def parse(path: Path, quantization: Mapping[str, Any]) -> Config:
    """The configuration; CheckpointError for a format or a transform that cannot be read."""
    groups = quantization.get("config_groups") or {}
    formats = {str(quantization.get("format"))}
    formats |= {str(group["format"]) for group in _objects(path, groups) if group.get("format")}
    _check_formats(path, formats)
    _check_sparsity(path, quantization)
    _check_transforms(path, quantization.get("transform_config") or {})
    schemes = tuple(
        Scheme(name, tuple(group["targets"]), group["weights"], group.get("input_activations"))
        for name, group in groups.items()
        if group.get("weights")
    )
    ignore = tuple(quantization.get("ignore") or ())
    return Config(path, schemes, ignore, quantization.get("kv_cache_scheme"))


def _objects(path: Path, groups: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    for name, group in groups.items():
        if not isinstance(group, Mapping) or "targets" not in group:
            raise CheckpointError(
                f"{path}: config_groups[{name!r}] is {group!r}; files have an object with targets "
                "and weights there: save the model with compressed-tensors, which writes it out"
            )
    return list(groups.values())


def _check_formats(path: Path, formats: set[str]) -> None:
    for name in sorted(formats - {*FORMATS, *_VAGUE}):
        if name in _REFUSED:
            raise CheckpointError(
                f"{path} is in the format {name} of compressed-tensors: {_REFUSED[name]}; {_DENSE}"
            )
        raise CheckpointError(
            f"{path} is in the format {name!r} of compressed-tensors, which is not known; "
            f"{', '.join(FORMATS)} can be read. {_DENSE.capitalize()}"
        )


def _check_sparsity(path: Path, quantization: Mapping[str, Any]) -> None:
    sparsity = quantization.get("sparsity_config") or {}
    stored = sparsity.get("format", "dense")
    if stored != "dense":
        raise CheckpointError(
            f"{path} has its weights in the sparse format {stored!r} of compressed-tensors, which "
            f"cannot be read; {_DENSE}"
        )


def _check_transforms(path: Path, transforms: Mapping[str, Any]) -> None:
    """Rotations that are folded into the weights are as good as none; others need kernels."""
    for name, scheme in (transforms.get("config_groups") or {}).items():
        places = {str(apply.get("location")) for apply in scheme.get("apply") or ()}
        online = sorted(places.intersection(_ONLINE))
        if online:
            raise CheckpointError(
                f"{path} rotates activations as it runs (transform_config {name!r} at "
                f"{', '.join(online)}), which no kernel of ours does; {_DENSE}"
            )


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_class(target: str, module: str) -> bool:
    return target == ("Embedding" if module.endswith("embed_tokens") else "Linear")


def _matches(target: str, module: str) -> bool:
    return any(test(target, module) for test in (_is_name, _is_pattern, _is_class))
