"""A checkpoint as its canonical program: the graph of its architecture, on weights that are checked
when they are read."""

from __future__ import annotations

from slipstream.builder.checked import checked
from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.builder.engine import GRAPH
from slipstream.builder.graph.program import Program, new_program
from slipstream.builder.graph.rank_ops import RankOps
from slipstream.builder.head import HeadModel
from slipstream.builder.models import architecture_of
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.shards import Shards
from slipstream.builder.pooling import StatedPooling
from slipstream.builder.score import answers_of
from slipstream.errors import BuildError
from slipstream.weights.tensor import LazyTensor


def declare(
    checkpoint: Checkpoint,
    stated: StatedPooling | None,
    head: HeadModel | None,
    rank: tuple[int, int],
    kv_dtype: str,
    page_size: int,
    max_seq_len: int,
) -> Program:
    """The canonical program of a checkpoint, for a rank of so many; it gives what a head takes."""
    model, architecture = checkpoint.config, architecture_of(checkpoint.config.architecture)
    expected = architecture.shapes(model)
    if stated is not None and stated.task == "embed":
        heads = [f"{m.name}.weight" for m in architecture.modules if m.tied]
        expected = {name: shape for name, shape in expected.items() if name not in heads}
    program = new_program(model.architecture)
    used: set[str] = set()

    def tensor(name: str) -> LazyTensor:
        used.add(name)
        return checked(checkpoint.tensor(name), expected.get(name), checkpoint.path)

    shards = Shards(architecture, model, tensor, *rank)
    config, decoder = shards.config, architecture.decoder
    ops = RankOps(program, decoder.caches(config, kv_dtype, page_size), shards.ranks)
    tap = None if head is None else head.tap(ops)
    declared = decoder(ops, config, architecture, shards.tensor, max_seq_len, shards, tap)
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
