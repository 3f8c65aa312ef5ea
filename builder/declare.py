"""A checkpoint as its canonical program: the graph of its architecture, on weights that are checked
when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.builder.engine import GRAPH
from slipstream.builder.graph.program import Program, new_program
from slipstream.builder.graph.rank_ops import RankOps
from slipstream.builder.models import architecture_of
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.shards import Shards
from slipstream.builder.pooling import StatedPooling
from slipstream.builder.score import answers_of
from slipstream.errors import BuildError, CheckpointError
from slipstream.weights.tensor import LazyTensor, QuantTensor, is_finite

Shapes = Mapping[str, tuple[int, ...]]


def declare(
    checkpoint: Checkpoint,
    stated: StatedPooling | None,
    rank: tuple[int, int],
    kv_dtype: str,
    page_size: int,
    max_seq_len: int,
) -> Program:
    """The canonical program of a checkpoint, for a rank of so many."""
    model, architecture = checkpoint.config, architecture_of(checkpoint.config.architecture)
    expected = architecture.shapes(model)
    if stated is not None and stated.task == "embed":
        heads = [f"{m.name}.weight" for m in architecture.modules if m.tied]
        expected = {name: shape for name, shape in expected.items() if name not in heads}
    program = new_program(model.architecture)
    used: set[str] = set()

    def tensor(name: str) -> LazyTensor:
        used.add(name)
        return _checked(checkpoint, name, expected)

    shards = Shards(architecture, model, tensor, *rank)
    config, decoder = shards.config, architecture.decoder
    ops = RankOps(program, decoder.caches(config, kv_dtype, page_size), shards.ranks)
    declared = decoder(ops, config, architecture, shards.tensor, max_seq_len, shards)
    _build(declared, checkpoint, stated)
    program.contract, program.caches = ops.contract(GRAPH), ops.caches
    differing = used ^ set(expected)
    if differing:
        raise BuildError(
            f"the graph of {model.architecture} and its table of modules differ in "
            f"{len(differing)} tensors, such as {min(differing)}; correct the architecture's file"
        )
    return program


def _build(decoder: Decoder, checkpoint: Checkpoint, stated: StatedPooling | None) -> None:
    if stated is None:
        decoder.build()
    elif stated.task == "embed":
        decoder.build_states()
    else:
        decoder.build_answers(answers_of(checkpoint, stated))


def _checked(checkpoint: Checkpoint, name: str, shapes: Shapes) -> LazyTensor:
    """A weight that has the shape its configuration says."""
    tensor = checkpoint.tensor(name)
    expected = shapes.get(name, tensor.format.shape)
    if expected != tensor.format.shape:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} has shape {list(tensor.format.shape)}, but by the "
            f"configuration it is {list(expected)}; config and weights are of different "
            "models: download both again"
        )
    return _finite(tensor, checkpoint.path)


def _finite(tensor: LazyTensor, path: Path) -> LazyTensor:
    """The weight, with a CheckpointError when it is loaded with numbers that are none."""

    def load() -> QuantTensor:
        loaded = tensor.load()
        for part, numbers in loaded.numbers().items():
            if not is_finite(numbers):
                raise CheckpointError(
                    f"{path}: tensor {tensor.name} holds infinite or undefined numbers among its "
                    f"{part}; the checkpoint is damaged: download it again"
                )
        return loaded

    return replace(tensor, load=load)
