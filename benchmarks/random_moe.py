"""A mixture of experts of random weights as a GGUF, for `cpu_peers.py`: Qwen3-MoE's layout in Q4_1,
a quarter of a billion parameters for a token, and the tokenizer of SmolLM2.

    python benchmarks/random_moe.py moe.gguf --experts 32
    slipstream build moe.gguf -o moe
    python benchmarks/cpu_peers.py --models '{"slipstream": "moe", "llama.cpp": "moe.gguf"}'

Rows of a router are normal, so that tokens spread over all experts; how many distinct ones a layer
chose for random tokens is printed, beside what even and independent choices would come to.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
VOCABULARY = 49152
BATCHES = (1, 8, 16, 64)
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of which about 250 million parameters are a token's."""

    experts: int
    top_k: int = 4
    layers: int = 16
    hidden: int = 1024
    width: int = 768
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64


def tensors(shape: Shape, rng: np.random.Generator) -> Iterator[tuple[str, Array, Type]]:
    """Every tensor by its name in the file; matrices keep the size of what they multiply."""

    def matrix(*size: int) -> Array:
        return rng.standard_normal(size, np.float32) / np.float32(np.sqrt(size[-1]))

    def ones(size: int) -> Array:
        return np.ones(size, np.float32)

    h, w, e = shape.hidden, shape.width, shape.experts
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd", matrix(VOCABULARY, h), Type.Q4_1
    yield "output_norm", ones(h), Type.F32
    for layer in range(shape.layers):
        for name, size in (
            *(("attn_norm", h), ("ffn_norm", h)),
            *(("attn_q_norm", shape.head_dim), ("attn_k_norm", shape.head_dim)),
        ):
            yield f"blk.{layer}.{name}", ones(size), Type.F32
        for name, rows, columns in (
            *(("attn_q", q, h), ("attn_k", kv, h), ("attn_v", kv, h), ("attn_output", h, q)),
        ):
            yield f"blk.{layer}.{name}", matrix(rows, columns), Type.Q4_1
        yield f"blk.{layer}.ffn_gate_inp", matrix(e, h), Type.F32
        for name, rows, columns in (("gate", w, h), ("up", w, h), ("down", h, w)):
            yield f"blk.{layer}.ffn_{name}_exps", matrix(e, rows, columns), Type.Q4_1


def write(shape: Shape, output: Path, seed: int) -> None:
    """The file."""
    writer = GGUFWriter(output, "qwen3moe", use_temp_file=True)
    writer.add_block_count(shape.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.width)
    writer.add_expert_feed_forward_length(shape.width)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    copy_tokenizer(writer)
    for name, values, kind in tensors(shape, np.random.default_rng(seed)):
        data = values if kind == Type.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_tokenizer(writer: GGUFWriter) -> None:
    """That of SmolLM2, which has as many tokens."""
    fetch = [sys.executable, str(ROOT / "examples" / "fetch_smollm2.py")]
    source = subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip()
    for key, field in GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], element)


def report_distinct(model: Path) -> None:
    """Prints how many experts of a layer random tokens choose: the mean over layers."""
    from slipstream.builder.checkpoints import open_checkpoint
    from slipstream.quantize.collect import collect
    from slipstream.quantize.forward import CheckpointModel
    from slipstream.server.engine_summary import Mixture

    checkpoint = CheckpointModel(open_checkpoint(model))
    config, rng = checkpoint.checkpoint.config, np.random.default_rng(1)
    # Tokens of a batch are of sequences of their own, each of which has one.
    windows = [np.array([token]) for token in rng.integers(20, 40000, max(BATCHES))]
    hidden, chosen = checkpoint.embed(windows), []
    for index in range(config.num_layers):
        weights = checkpoint.weights(f"model.layers.{index}.")
        with checkpoint.skeleton.filled(index, weights) as layer:
            _, routed = collect(checkpoint.skeleton, layer, hidden, ())
        assert routed is not None
        chosen.append(routed.ids.numpy())
        hidden = checkpoint.run_layer(index, hidden)
    even = Mixture(config.num_layers, config.extras["experts"], chosen[0].shape[1])
    for batch in BATCHES:
        found = np.mean([len(np.unique(ids[:batch])) for ids in chosen])
        wanted = even.distinct(batch)
        print(f"batch {batch}: {found:.1f} distinct experts a layer, {wanted:.1f} if even")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(Shape(arguments.experts, layers=arguments.layers), arguments.output, arguments.seed)
    report_distinct(arguments.output)


if __name__ == "__main__":
    main()
