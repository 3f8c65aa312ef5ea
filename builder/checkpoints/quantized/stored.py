"""The tensors of a quantized directory, every one of which a reader must account for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import DENSE, StoredTensor
from slipstream.weights.tensor import KVScales, LazyTensor

# Those behind the first two are of modules without a weight: of routers, of attention, of layers.
_DENSE_SUFFIXES = (
    ".weight",
    ".bias",
    ".e_score_correction_bias",
    ".router.scale",
    ".router.per_expert_scale",
    ".sinks",
    ".layer_scalar",
)
_LAYER_WEIGHT = re.compile(r".*\.layers\.\d+\..*\.weight")


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """What a reader made of a directory: weights by Hugging Face name, dense ones included.

    ``kv_scales`` are those of an fp8 KV cache. ``notes`` are sentences on where the configuration
    and the tensors disagree, and on what could not be kept as it is stored.
    """

    tensors: Mapping[str, LazyTensor]
    kv_scales: KVScales | None = None
    notes: tuple[str, ...] = ()


class Stored:
    """The tensors of a directory by name, and which of them have been taken.

    A reader takes the tensors of its format, then ``take_dense`` what is left; ``finish`` raises
    CheckpointError when a tensor remains.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self._tensors = tensors
        self._taken: set[str] = set()

    def __contains__(self, name: object) -> bool:
        """Whether the directory has the tensor, taken or not."""
        return name in self._tensors

    def names(self) -> tuple[str, ...]:
        """Every tensor of the directory, taken or not."""
        return tuple(self._tensors)

    def modules(self, suffix: str) -> tuple[str, ...]:
        """The modules that own a tensor called ``suffix``: all ``m`` with ``m.suffix``, in order of
        their names."""
        end = f".{suffix}"
        return tuple(sorted(n.removesuffix(end) for n in self._tensors if n.endswith(end)))

    def peek(self, name: str) -> StoredTensor | None:
        """A tensor, without taking it."""
        return self._tensors.get(name)

    def take(self, name: str, *dtypes: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
        """A tensor, which is thereby accounted for.

        ``dtypes`` are the types it may have, as safetensors spells them. Raises CheckpointError
        when it is missing or of another type or shape.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.path} lacks the tensor {name}, without which its module cannot be decoded; "
                "the files are incomplete: download the checkpoint again"
            )
        if dtypes and tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {tensor.dtype}, but its format stores "
                f"{' or '.join(dtypes)} there; config.json and weights are of different formats: "
                "download both again"
            )
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(tensor.shape)}, but beside the other "
                f"tensors of its module it should be {list(shape)}; download the checkpoint again"
            )
        self._taken.add(name)
        return tensor

    def take_optional(
        self, name: str, *dtypes: str, shape: tuple[int, ...] | None = None
    ) -> StoredTensor | None:
        """``take``, or None when there is no such tensor."""
        return self.take(name, *dtypes, shape=shape) if name in self._tensors else None

    def take_dense(self) -> dict[str, LazyTensor]:
        """Every weight, bias and the like that is left and is float32, float16 or bfloat16."""
        dense = {
            name: tensor.dense()
            for name, tensor in self._tensors.items()
            if name not in self._taken and name.endswith(_DENSE_SUFFIXES) and tensor.dtype in DENSE
        }
        self._taken.update(dense)
        return dense

    def finish(self) -> None:
        """Raises CheckpointError when a tensor has not been taken."""
        left = sorted(self._tensors.keys() - self._taken)
        if left:
            tensor = self._tensors[left[0]]
            raise CheckpointError(
                f"{self.path} holds {len(left)} tensors that its quantization does not account "
                f"for, such as {left[0]} ({tensor.dtype} {list(tensor.shape)}); they would be lost "
                "without a word: check quantization_config in config.json against the model's page"
            )


def group_size(settings: Fields, key: str, default: int = -1) -> int:
    """A number of columns, or -1 for all of them."""
    size = settings.integer(key, default, minimum=-1)
    if size == 0:
        raise settings.refusal(key, "a number of columns, or -1 for all")
    return size


class Notes:
    """Sentences on single modules, joined into one for all modules that it is true of."""

    def __init__(self) -> None:
        self._modules: dict[str, list[str]] = {}

    def add(self, sentence: str, module: str) -> None:
        """``sentence`` is true of ``module``."""
        self._modules.setdefault(sentence, []).append(module)

    def sentences(self) -> tuple[str, ...]:
        """Each sentence once, with how many modules it is true of and the first of them."""
        return tuple(
            f"{modules[0]}: {sentence}"
            if len(modules) == 1
            else f"{len(modules)} modules such as {modules[0]}: {sentence}"
            for sentence, modules in self._modules.items()
        )


def drop_empty_biases(stored: Stored, modules: Iterable[str], config: ModelConfig) -> None:
    """Takes the biases of zeros that some tools give to linears whose model has none."""
    architecture = architecture_of(config.architecture)
    for module in modules:
        bias = stored.peek(f"{module}.bias")
        wanted = architecture.has_bias(config, module)
        if bias is not None and not wanted and not np.any(bias.map()):
            stored.take(bias.name)


def dense_linears(tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """Modules of the layers whose weight is a dense matrix."""
    return tuple(
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if _LAYER_WEIGHT.fullmatch(name)
        and tensor.format.kind == "dense"
        and len(tensor.format.shape) == 2
    )
