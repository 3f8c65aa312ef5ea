"""The ``quantization_config`` of compressed-tensors: which scheme a module has.

Keys: https://github.com/vllm-project/compressed-tensors (versions up to 0.20).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from slipstream.builder.checkpoints.quantized.patterns import matches
from slipstream.builder.checkpoints.quantized.refused import REMEDY
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, shortened

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
    weights: Fields
    inputs: Fields | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The schemes, the modules without one, and the type of the KV cache (None: not quantized)."""

    path: Path
    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]
    quantization: Fields
    kv_cache: Fields | None = None
    notes: dict[str, None] = field(default_factory=dict)

    def ignores(self, module: str) -> bool:
        """Whether ``ignore`` names it, exactly or by ``re:``."""
        tests = (_is_name, self._is_pattern, _is_class)
        return any(test(target, module) for target in self.ignore for test in tests)

    def scheme(self, module: str) -> Scheme | None:
        """The scheme that targets a module: by its name, else by ``re:``, else by its class."""
        for test in (_is_name, self._is_pattern, _is_class):
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

    def _is_pattern(self, target: str, module: str) -> bool:
        pattern = target.removeprefix("re:")
        key = "targets or ignore"
        return pattern != target and matches(pattern, module, self.quantization, key)

    def note(self, sentence: str) -> None:
        """Remember something to tell, once."""
        self.notes[sentence] = None


def parse(path: Path, quantization: Fields) -> Config:
    """The configuration; CheckpointError for a format or a transform that cannot be read."""
    groups = _groups(path, quantization)
    formats = {quantization.text("format", "None")}
    formats |= {group.text("format") for group in groups.values() if group.has("format")}
    _check_formats(path, formats)
    _check_sparsity(path, quantization)
    _check_transforms(path, quantization.fields("transform_config", {}))
    schemes = tuple(
        Scheme(
            name,
            group.texts("targets"),
            group.fields("weights"),
            group.optional_fields("input_activations"),
        )
        for name, group in groups.items()
        if group.has("weights")
    )
    kv_cache = quantization.optional_fields("kv_cache_scheme")
    return Config(path, schemes, quantization.texts("ignore", ()), quantization, kv_cache)


def _groups(path: Path, quantization: Fields) -> dict[str, Fields]:
    groups = quantization.fields("config_groups", {})
    for name, group in groups.values.items():
        if not isinstance(group, dict) or "targets" not in group:
            raise CheckpointError(
                f"{path}: config_groups[{name!r:.80}] is {shortened(group)}; files have an object "
                "with targets and weights there: save the model with compressed-tensors, which "
                "writes it out"
            )
    return {name: groups.fields(name) for name in groups.values}


def _check_formats(path: Path, formats: set[str]) -> None:
    for name in sorted(formats - {*FORMATS, *_VAGUE}):
        if name in _REFUSED:
            raise CheckpointError(
                f"{path} is in the format {name} of compressed-tensors: {_REFUSED[name]}; {REMEDY}"
            )
        raise CheckpointError(
            f"{path} is in the format {name!r} of compressed-tensors, which is not known; "
            f"{', '.join(FORMATS)} can be read. {REMEDY.capitalize()}"
        )


def _check_sparsity(path: Path, quantization: Fields) -> None:
    stored = quantization.fields("sparsity_config", {}).text("format", "dense")
    if stored != "dense":
        raise CheckpointError(
            f"{path} has its weights in the sparse format {stored!r:.80} of compressed-tensors, "
            f"which cannot be read; {REMEDY}"
        )


def _check_transforms(path: Path, transforms: Fields) -> None:
    """Rotations that are folded into the weights are as good as none; others need kernels."""
    for name, scheme in transforms.fields_by_name("config_groups").items():
        applied = scheme.list_of_fields("apply") if scheme.has("apply") else ()
        places = {apply.text("location", "") for apply in applied}
        online = sorted(places.intersection(_ONLINE))
        if online:
            raise CheckpointError(
                f"{path} rotates activations as it runs (transform_config {name!r:.80} at "
                f"{', '.join(online)}), which no kernel of ours does; {REMEDY}"
            )


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_class(target: str, module: str) -> bool:
    return target == ("Embedding" if module.endswith("embed_tokens") else "Linear")
