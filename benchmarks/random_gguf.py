"""Random weights as a GGUF, for `cpu_peers.py`: a mixture of experts in Qwen3-MoE's layout with a
quarter of a billion parameters for a token, or the shape of Gemma 3 270M with an embedding of 8
bits, which is how llama.cpp's own tool quantizes one of that width.

    python benchmarks/random_gguf.py experts experts.gguf --experts 32
    python benchmarks/random_gguf.py gemma-3-270m gemma.gguf
    slipstream build gemma.gguf -o gemma
    python benchmarks/cpu_peers.py --models '{"slipstream": "gemma", "llama.cpp": "gemma.gguf"}'

The tokenizer is that of SmolLM2, with tokens that no text has up to the size of the vocabulary.
Rows of a router are normal, so that tokens spread over all experts; how many distinct ones a layer
chose for random tokens is printed, beside what even and independent choices would come to.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, TokenType
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
BATCHES = (1, 8, 16, 64)
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, and how it is stored; ``experts`` is 0 for a dense one, and ``window`` for
    one that always sees its whole context."""

    architecture: str
    vocabulary: int
    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[str, ...]
    embedding: Type
    matrices: Type
    window: int = 0
    experts: int = 0
    top_k: int = 0


SHAPES = {
    "experts": Shape(
        "qwen3moe",
        vocabulary=49152,
        hidden=1024,
        width=768,
        layers=16,
        heads=16,
        kv_heads=4,
        head_dim=64,
        norms=("attn_norm", "ffn_norm"),
        embedding=Type.Q4_1,
        matrices=Type.Q4_1,
        experts=32,
        top_k=4,
    ),
    "gemma-3-270m": Shape(
        "gemma3",
        vocabulary=262144,
        hidden=640,
        width=2048,
        layers=18,
        heads=4,
        kv_heads=1,
        head_dim=256,
        norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
        embedding=Type.Q8_0,
        matrices=Type.Q4_1,
        window=512,
    ),
}


def tensors(shape: Shape, rng: np.random.Generator) -> Iterator[tuple[str, Array, Type]]:
    """Every tensor by its name in the file; matrices keep the size of what they multiply."""

    def matrix(*size: int) -> Array:
        return rng.standard_normal(size, np.float32) / np.float32(np.sqrt(size[-1]))

    def ones(size: int) -> Array:
        return np.ones(size, np.float32)

    h, w, e = shape.hidden, shape.width, shape.experts
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd", matrix(shape.vocabulary, h), shape.embedding
    yield "output_norm", ones(h), Type.F32
    for layer in (f"blk.{i}" for i in range(shape.layers)):
        for name in shape.norms:
            yield f"{layer}.{name}", ones(h), Type.F32
        for name in ("attn_q_norm", "attn_k_norm"):
            yield f"{layer}.{name}", ones(shape.head_dim), Type.F32
        for name, rows, columns in (
            *(("attn_q", q, h), ("attn_k", kv, h), ("attn_v", kv, h), ("attn_output", h, q)),
        ):
            yield f"{layer}.{name}", matrix(rows, columns), shape.matrices
        if e:
            yield f"{layer}.ffn_gate_inp", matrix(e, h), Type.F32
        stacked, suffix = ((e,), "_exps") if e else ((), "")
        for name, rows, columns in (("gate", w, h), ("up", w, h), ("down", h, w)):
            yield f"{layer}.ffn_{name}{suffix}", matrix(*stacked, rows, columns), shape.matrices


def write(shape: Shape, output: Path, seed: int) -> None:
    """The file."""
    writer = GGUFWriter(output, shape.architecture, use_temp_file=True)
    writer.add_block_count(shape.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.experts:
        writer.add_expert_feed_forward_length(shape.width)
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.top_k)
    copy_tokenizer(writer, shape.vocabulary)
    for name, values, kind in tensors(shape, np.random.default_rng(seed)):
        data = values if kind == Type.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_tokenizer(writer: GGUFWriter, vocabulary: int) -> None:
    """That of SmolLM2, which has 49,152 tokens, and as many more as the vocabulary has."""
    fetch = [sys.executable, str(ROOT / "examples" / "fetch_smollm2.py")]
    source = subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip()
    fields = GGUFReader(source).fields
    unused = range(len(fields["tokenizer.ggml.tokens"].data), vocabulary)
    more = {
        "tokenizer.ggml.tokens": [f"<unused{i}>" for i in unused],
        "tokenizer.ggml.token_type": [int(TokenType.UNUSED)] * len(unused),
    }
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            element = field.types[1] if len(field.types) > 1 else None
            value: Any = field.contents()
            if key in more:
                value.extend(more[key])
            writer.add_key_value(key, value, field.types[0], element)


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
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--experts", type=int, help="of another number than 32")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--matrices", choices=("Q4_0", "Q4_1"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    matrices = Type[arguments.matrices] if arguments.matrices else None
    given = {"experts": arguments.experts, "layers": arguments.layers, "matrices": matrices}
    changes = {name: value for name, value in given.items() if value is not None}
    shape = dataclasses.replace(SHAPES[arguments.shape], **changes)
    write(shape, arguments.output, arguments.seed)
    if shape.experts:
        report_distinct(arguments.output)


if __name__ == "__main__":
    main()
