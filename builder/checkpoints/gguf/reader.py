"""A GGUF file: llama.cpp's container of one model, its quantized blocks kept as they are."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.base import (
    check_templates,
    generation_config,
    tell_left_out,
    unknown_tensor,
    write_json,
)
from slipstream.builder.checkpoints.gguf.blocks import (
    decode,
    is_lossless,
    undo_rope_permutation,
    weight_format,
)
from slipstream.builder.checkpoints.gguf.config import (
    ROPE_FACTORS,
    block_count,
    huggingface_config,
)
from slipstream.builder.checkpoints.gguf.experts import unstacked
from slipstream.builder.checkpoints.gguf.file import GGUFFile, GGUFTensor, parts_of, read_gguf
from slipstream.builder.checkpoints.gguf.tokenizer import build_tokenizer, tokenizer_config
from slipstream.builder.contract import PoolingMode
from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.models import architecture_of
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin
from slipstream.weights.tensor import LazyTensor, QuantTensor, stack_rows

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"blk\.(\d{1,9})\.")
_MEND_TEMPLATE = (
    "copy the file with another: gguf-new-metadata --chat-template-file chat_template.jinja OLD NEW"
)
_MEND_POOLING = "use the model's Hugging Face checkpoint"
# llama.cpp's numbers; 2 takes the first token, 4 is for rerankers.
_POOLING: Mapping[int, PoolingMode] = {1: "mean", 3: "last"}


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """A model of an architecture that has names for GGUF, in one file.

    ``stored`` has the tensors by Hugging Face name, of one whose parts the file has apart those in
    the order of their rows. Types whose codes are integers (Q4_0 to Q8_0, Q2_K to Q6_K, IQ4) and
    MXFP4 stay quantized, F32, F16 and BF16 stay dense, every other type becomes float32.
    """

    path: Path
    config: ModelConfig
    stored: Mapping[str, tuple[GGUFTensor, ...]]
    file: GGUFFile

    @property
    def kv_scales(self) -> None:
        """The format has none."""
        return

    @property
    def pooling(self) -> StatedPooling | None:
        """By the metadata; vectors are of length 1, as llama.cpp makes them."""
        keys = Fields(self.file.metadata, Origin(self.path, _MEND_POOLING))
        key = f"{keys.text('general.architecture')}.pooling_type"
        kind = keys.integer(key, 0)
        if kind and kind not in _POOLING:
            raise keys.refusal(key, "0, 1 or 3: no pooling, the mean, or the last token")
        return StatedPooling("embed", _POOLING[kind]) if kind else None

    def names(self) -> tuple[str, ...]:
        """Every tensor of the checkpoint, by its Hugging Face name."""
        return tuple(self.stored)

    def tensor(self, name: str) -> LazyTensor:
        """One weight, not yet read."""
        if name not in self.stored:
            raise unknown_tensor(self.path, name, self.names())
        parts = [self._part(name, stored) for stored in self.stored[name]]
        if len(parts) == 1:
            return parts[0]
        if len({replace(part.format, shape=()) for part in parts}) > 1:
            parts = [as_dense(part, "float32") for part in parts]
        return stack_rows(parts, name)

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

    def _part(self, name: str, stored: GGUFTensor) -> LazyTensor:
        form = weight_format(stored.name, stored.kind, stored.shape)
        return LazyTensor(name, form, lambda: self._load(name, stored))

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
    """Opens a GGUF file, which holds no more than a text model; reads metadata, no weights.

    Layers that predict further tokens are left out, and refused with ``strict``.
    """
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
    decoder = _of_decoder(file, config, strict=strict)
    stored = _by_huggingface_name(decoder, architecture, config)
    unread = [name for name in stored if architecture.is_redundant(config, name)]
    tell_left_out(path, unread, strict=strict)
    stored = {name: parts for name, parts in stored.items() if name not in unread}
    _log_dequantized(path, [part for parts in stored.values() for part in parts])
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
) -> dict[str, tuple[GGUFTensor, ...]]:
    """The tensors of each name, in the order of their rows."""
    tensors = unstacked(file.tensors, _experts(architecture, config))
    for name in ROPE_FACTORS:
        tensors.pop(name, None)
    names = dict.fromkeys(map(architecture.from_gguf, tensors))
    theirs = {name: architecture.to_gguf(name) for name in names if name is not None}
    unknown = tensors.keys() - {part for parts in theirs.values() for part in parts}
    if unknown:
        raise CheckpointError(
            f"{file.path} has {len(unknown)} tensors that its architecture "
            f"{file.metadata['general.architecture']!r} does not use, such as {min(unknown)}; it "
            "is of a variant that is not supported: use the model's Hugging Face checkpoint"
        )
    for tensor in file.tensors.values():
        weight_format(tensor.name, tensor.kind, tensor.shape)
    missing = [part for parts in theirs.values() for part in parts if part not in tensors]
    if missing:
        raise unknown_tensor(file.path, missing[0], tuple(file.tensors))
    return {
        name: _with_axes_of_one([tensors[part] for part in parts], architecture.shape(config, name))
        for name, parts in theirs.items()
    }


def _of_decoder(file: GGUFFile, config: ModelConfig, *, strict: bool) -> GGUFFile:
    """The file without the tensors of blocks behind the decoder's, which predict further tokens."""
    further = range(config.num_layers, block_count(file.metadata))
    blocks = ((name, _BLOCK.match(name)) for name in file.tensors)
    left_out = [name for name, block in blocks if block and int(block[1]) in further]
    tell_left_out(file.path, left_out, strict=strict)
    kept = file.tensors.keys() - set(left_out)
    return replace(file, tensors={n: t for n, t in file.tensors.items() if n in kept})


def _experts(architecture: Architecture, config: ModelConfig) -> int:
    measures = (m.experts for m in architecture.modules if m.experts is not None)
    return next((measure(config).units for measure in measures), 0)


def _with_axes_of_one(
    parts: Sequence[GGUFTensor], shape: tuple[int, ...] | None
) -> tuple[GGUFTensor, ...]:
    """The parts of a tensor; of an only one with the axes of one element that llama.cpp's converter
    drops."""
    first = parts[0]
    if len(parts) > 1 or shape is None or _longer(shape) != _longer(first.shape):
        return tuple(parts)
    return (replace(first, shape=shape),)


def _longer(shape: tuple[int, ...]) -> list[int]:
    return [length for length in shape if length != 1]


def _log_dequantized(path: Path, tensors: Iterable[GGUFTensor]) -> None:
    kinds = Counter(t.kind.name for t in tensors if not is_lossless(t.kind, t.shape))
    for kind, count in kinds.items():
        logger.info("%s: %d tensors of type %s become float32", path.name, count, kind)
