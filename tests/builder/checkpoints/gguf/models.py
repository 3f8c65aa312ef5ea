"""Tiny GGUF files, made tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 64, 4, 2, 96, 40


@dataclass
class TinyModel:
    """What goes into a GGUF file; tensors are by GGUF name, in the order of their rows."""

    architecture: str = "llama"
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    kinds: dict[str, Type] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            common = key.startswith(("tokenizer.", "split."))
            add(writer, key if common else f"{self.architecture}.{key}", value)
        for name, values in self.tensors.items():
            kind = self.kinds.get(name, Type.F32)
            stored = values if kind not in QUANTIZABLE else gguf.quants.quantize(values, kind)
            writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


QUANTIZABLE = (Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.Q8_0)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:  # noqa: ANN401
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def tiny(architecture: str = "llama", *, tied: bool = True) -> TinyModel:
    """A random model of one layer."""
    rng = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    if not tied:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    if architecture == "qwen2":
        shapes |= {f"blk.0.attn_{x}.bias": shapes[f"blk.0.attn_{x}.weight"][:1] for x in "qkv"}
    if architecture == "qwen3":
        shapes |= {f"blk.0.attn_{x}_norm.weight": (head_dim,) for x in "qk"}
    metadata = {
        "block_count": 1,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return TinyModel(architecture, metadata, tensors)


def random_blocks(kind: Type, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random blocks of any type, their float16 scales (wherever they are) finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(3).integers(0, 256, (rows, columns // block * size), np.uint8)
    return np.where(data & 0x7C == 0x7C, data & 0xBF, data)


def with_head_dim(model: TinyModel, head_dim: int) -> TinyModel:
    """The same model with other sizes of q, k, v and o."""
    rng = np.random.default_rng(1)
    sizes = {"q": HEADS * head_dim, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim}
    new: dict[str, tuple[int, ...]] = {}
    new |= {f"blk.0.attn_{x}.weight": (size, HIDDEN) for x, size in sizes.items()}
    new |= {f"blk.0.attn_{x}_norm.weight": (head_dim,) for x in "qk"}
    new |= {"blk.0.attn_output.weight": (HIDDEN, HEADS * head_dim)}
    model.tensors |= {n: rng.standard_normal(s).astype(np.float32) for n, s in new.items()}
    model.metadata |= {"rope.dimension_count": head_dim, "attention.key_length": head_dim}
    return model
