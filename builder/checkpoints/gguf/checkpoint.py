"""A GGUF file: llama.cpp's container of one model, its quantized blocks kept as they are."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.base import generation_config, unknown_tensor, write_json
from slipstream.builder.checkpoints.gguf.blocks import (
    decode,
    is_lossless,
    undo_rope_permutation,
    weight_format,
)
from slipstream.builder.checkpoints.gguf.config import huggingface_config
from slipstream.builder.checkpoints.gguf.file import GGUFFile, GGUFTensor, read_gguf
from slipstream.builder.checkpoints.gguf.tokenizer import build_tokenizer, tokenizer_config
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.tensor import LazyTensor, QuantTensor

logger = logging.getLogger(__name__)

# Consumed by the configuration: Llama 3's frequency divisors.
_ROPE_FACTORS = "rope_freqs.weight"
_MODULES: Mapping[str, str] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
_LAYER_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<part>weight|bias)")


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """A model of the llama (Mistral included), qwen2 or qwen3 architecture in one GGUF file.

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
        template = metadata.get("tokenizer.chat_template")
        if template is not None:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _load(self, name: str, stored: GGUFTensor) -> QuantTensor:
        tensor = decode(name, stored.kind, stored.shape, stored.map())
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        module = name.rsplit(".", 2)[-2]
        if self.file.metadata["general.architecture"] == "llama" and module in heads:
            return undo_rope_permutation(tensor, heads[module])
        return tensor


def open_checkpoint(source: str | os.PathLike[str]) -> GGUFCheckpoint:
    """Opens a GGUF file; reads metadata, no weights."""
    path = Path(source)
    file = read_gguf(path)
    factors = file.tensors.get(_ROPE_FACTORS)
    raw = huggingface_config(
        file.metadata,
        {name: tensor.shape for name, tensor in file.tensors.items()},
        None if factors is None else _dense(factors),
    )
    stored = _by_huggingface_name(file)
    _log_dequantized(path, stored.values())
    config = _with_biases(ModelConfig.from_huggingface(raw), stored)
    return GGUFCheckpoint(path, config, stored, file)


def _dense(tensor: GGUFTensor) -> NDArray[np.float32]:
    return decode(tensor.name, tensor.kind, tensor.shape, tensor.map()).dequantize()


def _by_huggingface_name(file: GGUFFile) -> dict[str, GGUFTensor]:
    names = {name: _huggingface_name(name) for name in file.tensors if name != _ROPE_FACTORS}
    unknown = [name for name, ours in names.items() if ours is None]
    if unknown:
        raise CheckpointError(
            f"{file.path} has {len(unknown)} tensors that its architecture "
            f"{file.metadata['general.architecture']!r} does not use, such as {unknown[0]}; it is "
            "of a variant that is not supported"
        )
    for tensor in file.tensors.values():
        weight_format(tensor.name, tensor.kind, tensor.shape)
    return {ours: file.tensors[name] for name, ours in names.items() if ours is not None}


def _huggingface_name(name: str) -> str | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, module, part = match.group("layer", "module", "part")
    if layer is None:
        return f"{_MODULES[module]}.{part}" if module in _MODULES else None
    if module not in _LAYER_MODULES:
        return None
    return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{part}"


def _with_biases(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """Which linears have a bias: the file's tensors say it, its metadata does not."""
    biased = {name.rsplit(".", 2)[-2] for name in names if name.endswith(".bias")}
    return dataclasses.replace(
        config,
        attention_bias="q_proj" in biased,
        o_bias="o_proj" in biased,
        mlp_bias="down_proj" in biased,
    )


def _log_dequantized(path: Path, tensors: Iterable[GGUFTensor]) -> None:
    kinds = Counter(t.kind.name for t in tensors if not is_lossless(t.kind, t.shape))
    for kind, count in kinds.items():
        logger.info("%s: %d tensors of type %s become float32", path.name, count, kind)
