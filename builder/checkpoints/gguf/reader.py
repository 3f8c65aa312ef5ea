"""A GGUF file: llama.cpp's container of one model, its quantized blocks kept as they are."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.base import (
    check_templates,
    generation_config,
    unknown_tensor,
    write_json,
)
from slipstream.builder.checkpoints.gguf.blocks import (
    decode,
    is_lossless,
    undo_rope_permutation,
    weight_format,
)
from slipstream.builder.checkpoints.gguf.config import ROPE_FACTORS, huggingface_config
from slipstream.builder.checkpoints.gguf.experts import unstacked
from slipstream.builder.checkpoints.gguf.file import GGUFFile, GGUFTensor, parts_of, read_gguf
from slipstream.builder.checkpoints.gguf.tokenizer import build_tokenizer, tokenizer_config
from slipstream.builder.models import architecture_of
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin
from slipstream.weights.tensor import LazyTensor, QuantTensor

logger = logging.getLogger(__name__)

_MEND_TEMPLATE = (
    "copy the file with another: gguf-new-metadata --chat-template-file chat_template.jinja OLD NEW"
)


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """A model of an architecture that has names for GGUF, in one file.

    ``stored`` has the tensors by Hugging Face name. Types whose codes are integers (Q4_0 to Q8_0,
    Q2_K to Q6_K, IQ4, MXFP4) stay quantized, F32, F16 and BF16 stay dense, every other type becomes
    float32.
    """

    path: Path
    config: ModelConfig
    stored: Mapping[str, GGUFTensor]
    file: GGUFFile

    @property
    def kv_scales(self) -> None:
        """The format has none."""
        return

    def names(self) -> tuple[str, ...]:
        """Every tensor of the checkpoint, by its Hugging Face name."""
        return tuple(self.stored)

    def tensor(self, name: str) -> LazyTensor:
        """One weight, not yet read."""
        if name not in self.stored:
            raise unknown_tensor(self.path, name, self.names())
        stored = self.stored[name]
        form = weight_format(stored.name, stored.kind, stored.shape)
        return LazyTensor(name, form, lambda: self._load(name, stored))

    def write_tokenizer(self, directory: Path) -> None:
        """Writes the tokenizer that the metadata describes."""
        metadata = self.file.metadata
        build_tokenizer(metadata).save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))
        generation = generation_config(self.config.bos_token_id, self.config.eos_token_ids)
        write_json(directory / "generation_config.json", generation)
        template = Fields(metadata, Origin(self.path)).optional_text("tokenizer.chat_template")
        if template is not None:
            check_templates({"default": template}, Origin(self.path, _MEND_TEMPLATE))
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _load(self, name: str, stored: GGUFTensor) -> QuantTensor:
        tensor = decode(name, stored.kind, stored.shape, stored.map())
        module = architecture_of(self.config.architecture).module(name.rpartition(".")[0])
        if module is not None and module.gguf_permuted:
            (rows,) = module.rows
            tensor = undo_rope_permutation(tensor, rows(self.config).units)
        if module is not None and module.offset:
            # llama.cpp stores what a norm multiplies by.
            stored_weight = tensor.dequantize() - np.float32(module.offset)
            tensor = replace(tensor, codes=stored_weight.astype(tensor.codes.dtype))
        return tensor


def open_checkpoint(source: str | os.PathLike[str], *, strict: bool = False) -> GGUFCheckpoint:
    """Opens a GGUF file, which holds no more than a text model; reads metadata, no weights."""
    path = Path(source)
    file = read_gguf(path)
    factors = {name: _dense(file.tensors[name]) for name in ROPE_FACTORS if name in file.tensors}
    raw = huggingface_config(
        file.metadata,
        {name: tensor.shape for name, tensor in file.tensors.items()},
        factors,
    )
    config = ModelConfig.from_huggingface(raw)
    architecture = architecture_of(config.architecture)
    stored = _by_huggingface_name(file, architecture, config)
    _log_dequantized(path, stored.values())
    # The file's tensors say which linears have a bias, its metadata does not.
    config = architecture.with_biases(config, stored)
    return GGUFCheckpoint(path, config, stored, file)


def files_of(path: Path) -> list[Path]:
    """The file, or all parts of the model that it is a part of."""
    return parts_of(path)


def _dense(tensor: GGUFTensor) -> NDArray[np.float32]:
    return decode(tensor.name, tensor.kind, tensor.shape, tensor.map()).dequantize()


def _by_huggingface_name(
    file: GGUFFile, architecture: Architecture, config: ModelConfig
) -> dict[str, GGUFTensor]:
    tensors = unstacked(_of_decoder(file, config), _experts(architecture, config))
    names = {name: architecture.from_gguf(name) for name in tensors if name not in ROPE_FACTORS}
    unknown = [name for name, ours in names.items() if ours is None]
    if unknown:
        raise CheckpointError(
            f"{file.path} has {len(unknown)} tensors that its architecture "
            f"{file.metadata['general.architecture']!r} does not use, such as {unknown[0]}; it is "
            "of a variant that is not supported"
        )
    for tensor in file.tensors.values():
        weight_format(tensor.name, tensor.kind, tensor.shape)
    return {
        ours: _with_axes_of_one(tensors[name], architecture.shape(config, ours))
        for name, ours in names.items()
        if ours is not None
    }


def _of_decoder(file: GGUFFile, config: ModelConfig) -> dict[str, GGUFTensor]:
    """The file's tensors but those of blocks behind the decoder's, which predict further tokens."""
    blocks = int(file.metadata[f"{file.metadata['general.architecture']}.block_count"])
    further = {f"blk.{i}" for i in range(config.num_layers, blocks)}
    kept = {
        name: tensor
        for name, tensor in file.tensors.items()
        if ".".join(name.split(".", 2)[:2]) not in further
    }
    if len(kept) < len(file.tensors):
        count = len(file.tensors) - len(kept)
        logger.info("%s: %d tensors that predict further tokens are left out", file.path, count)
    return kept


def _experts(architecture: Architecture, config: ModelConfig) -> int:
    measures = (m.experts for m in architecture.modules if m.experts is not None)
    return next((measure(config).units for measure in measures), 0)


def _with_axes_of_one(tensor: GGUFTensor, shape: tuple[int, ...] | None) -> GGUFTensor:
    """The tensor with the axes of one element that llama.cpp's converter drops."""
    if shape is None or _longer(shape) != _longer(tensor.shape):
        return tensor
    return replace(tensor, shape=shape)


def _longer(shape: tuple[int, ...]) -> list[int]:
    return [length for length in shape if length != 1]


def _log_dequantized(path: Path, tensors: Iterable[GGUFTensor]) -> None:
    kinds = Counter(t.kind.name for t in tensors if not is_lossless(t.kind, t.shape))
    for kind, count in kinds.items():
        logger.info("%s: %d tensors of type %s become float32", path.name, count, kind)
