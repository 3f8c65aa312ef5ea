"""A head that guesses tokens beside the model that it guesses for: two graphs of one engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slipstream.builder.checked import checked
from slipstream.builder.checkpoints import on_disk
from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.builder.checkpoints.huggingface.head import HeadCheckpoint, open_head
from slipstream.builder.contract import Head
from slipstream.builder.engine import HEAD
from slipstream.builder.graph.ops import Ops
from slipstream.builder.graph.passes import Pass, run_passes
from slipstream.builder.graph.program import Program, StoredWeight, new_program
from slipstream.builder.graph.rank_ops import RankOps
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.eagle3 import (
    ARCHITECTURE,
    DRAFT_VOCAB,
    NUM_STATES,
    TARGET_SIZE,
    Fused,
    HeadDecoder,
)
from slipstream.builder.models.shards import Shards, TensorSource
from slipstream.builder.options import BuildOptions
from slipstream.builder.pooling import stated_pooling
from slipstream.builder.targets.base import Target
from slipstream.errors import BuildError, CheckpointError
from slipstream.weights.tensor import LazyTensor

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class HeadModel:
    """A head that fits its target. ``layers`` are how many of the target's the states have gone
    through that it takes; ``used`` are its tensors that graphs have read."""

    checkpoint: HeadCheckpoint
    source: str
    layers: tuple[int, ...]
    used: set[str] = field(default_factory=set)

    def tensor(self, name: str) -> LazyTensor:
        """A weight by the name that it has in the engine, where the target has others."""
        self.used.add(name)
        shape = ARCHITECTURE.shapes(self.checkpoint.config).get(name)
        tensor = checked(self.checkpoint.tensor(name), shape, self.checkpoint.path)
        return replace(tensor, name=f"head.{name}")

    def tap(self, ops: Ops) -> Fused:
        """What makes the target's output that the head takes."""
        return Fused(ops, self.checkpoint.config, self.tensor, self.layers)

    @property
    def described(self) -> Head:
        """For the manifest."""
        mask = self.checkpoint.mask_token
        kind, known = "eagle3" if mask is None else "p-eagle", self.checkpoint.config.extras
        return Head(kind, self.layers, known[DRAFT_VOCAB], mask, self.source)  # type: ignore[arg-type]


def head_for(checkpoint: Checkpoint, options: BuildOptions, target: Target) -> HeadModel | None:
    """The head that the options name, if they name one.

    Raises CheckpointError for one that cannot be read, and BuildError for one of another model, or
    where it could not run.
    """
    source = options.speculative_model
    if source is None:
        return None
    if target.name not in ("cpu", "cuda"):
        raise BuildError(
            f"speculative_model is {source}, and engines of target {target.name} run one graph; "
            "leave it out, or use --target cpu or cuda"
        )
    if options.tp_size != 1:
        raise BuildError(
            f"speculative_model is {source} and tp_size {options.tp_size}, and engines of several "
            "ranks run one graph; leave one of them out"
        )
    if stated_pooling(checkpoint.pooling, options) is not None:
        raise BuildError(
            f"speculative_model is {source}, and the engine makes no text that could be guessed; "
            "leave it out, or use --task generate"
        )
    head = _open(source, checkpoint)
    target.check(head.checkpoint.config, options)
    return head


def _open(source: str, target: Checkpoint) -> HeadModel:
    """The head at a path, or of the hub, for a target."""
    path, config = on_disk(source), target.config
    head = open_head(path)
    own, states = head.config, head.config.extras
    layers = head.layers or _usual_layers(config)
    problem = None
    if own.vocab_size != config.vocab_size:
        problem = f"it is for {own.vocab_size} tokens, and the model has {config.vocab_size}"
    elif states[TARGET_SIZE] != config.hidden_size:
        problem = (
            f"it reads states of {states[TARGET_SIZE]} numbers, and those of the model have "
            f"{config.hidden_size}"
        )
    elif len(layers) != states[NUM_STATES] or max(layers) > config.num_layers:
        problem = (
            f"it reads {states[NUM_STATES]} states, after layers {', '.join(map(str, layers))} of "
            f"{config.num_layers}"
        )
    elif _EMBEDDING not in head.tensors and own.hidden_size != config.hidden_size:
        problem = "it has no embedding, and is not as wide as the model, whose own it would be"
    if problem is not None:
        raise BuildError(
            f"speculative_model {source} cannot guess for {target.path}: {problem}; give the head "
            "that was made for this model"
        )
    return HeadModel(head, str(path.absolute()) if Path(source).exists() else source, layers)


def compile_head(
    model: HeadModel,
    embedding: LazyTensor,
    passes: Sequence[Pass],
    kv_dtype: str,
    page_size: int,
    max_seq_len: int,
    stored: Mapping[str, StoredWeight],
) -> Program:
    """The lowered program of a head, after that of its target, whose weights are ``stored``.

    It shares the target's ``embedding`` unless it has one or the target keeps it in another form.
    """
    limits = kv_dtype, page_size, max_seq_len
    program = _declare(model, embedding, *limits)
    run_passes(program, passes)
    if any(name in stored and stored[name].parts != w.parts for name, w in program.stored.items()):
        program = _declare(model, replace(embedding, name=f"head.{_EMBEDDING}"), *limits)
        run_passes(program, passes)
    return program


def _declare(
    model: HeadModel, embedding: LazyTensor, kv_dtype: str, page_size: int, max_seq_len: int
) -> Program:
    """The canonical program."""
    checkpoint = model.checkpoint

    def tensor(name: str) -> LazyTensor:
        shared = name == _EMBEDDING and name not in checkpoint.tensors
        return embedding if shared else model.tensor(name)

    program = new_program("head")
    ops = RankOps(program, HeadDecoder.caches(checkpoint.config, kv_dtype, page_size))
    source: TensorSource = tensor
    HeadDecoder(
        ops, checkpoint.config, ARCHITECTURE, source, max_seq_len,
        Shards(ARCHITECTURE, checkpoint.config, source),
        tokens=checkpoint.tokens, mask_token=checkpoint.mask_token,
    ).build()  # fmt: skip
    program.contract, program.caches = ops.contract(HEAD), ops.caches
    if unread := sorted(checkpoint.tensors.keys() - model.used):
        raise CheckpointError(
            f"{checkpoint.path} holds {len(unread)} tensors that an EAGLE-3 head does not read, "
            f"such as {unread[0]}; its config.json does not describe it: download the head again"
        )
    return program


def _usual_layers(config: ModelConfig) -> tuple[int, ...]:
    """Those of EAGLE-3's own heads, near the beginning, the middle and the end."""
    number = config.num_layers
    return (min(2, number), number // 2, max(number - 3, 0))
