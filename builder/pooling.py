"""What an engine that does not generate is for: by what its checkpoint says, and by the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from slipstream.builder.contract import Pooling, PoolingMode, Similarity
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError


@dataclass(frozen=True, slots=True)
class StatedPooling:
    """What a checkpoint says of its use; the fields are those of ``Pooling``.

    ``answers`` are the tokens whose logits make a score: yes and, if there is one, no.
    """

    task: Literal["embed", "score"]
    mode: PoolingMode = "last"
    normalize: bool = True
    similarity: Similarity = "cosine"
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    answers: tuple[int, ...] = ()


def stated_pooling(stated: StatedPooling | None, options: BuildOptions) -> StatedPooling | None:
    """What an engine is to be for by the options, or else by its checkpoint; None is to generate.

    Raises BuildError for a way of pooling that nothing is made by.
    """
    if options.task == "auto":
        chosen = stated
    elif options.task == "generate":
        chosen = None
    else:
        same = stated is not None and stated.task == options.task
        chosen = stated if same else StatedPooling(options.task)
    return chosen if options.pooling == "auto" else _with_mode(chosen, options.pooling)


def _with_mode(stated: StatedPooling | None, mode: PoolingMode) -> StatedPooling:
    if stated is None or stated.task != "embed":
        raise BuildError(
            f"pooling is {mode}, but the checkpoint does not say that it makes vectors; leave it "
            "out, or add --task embed"
        )
    return replace(stated, mode=mode)


def pooling_of(stated: StatedPooling, config: ModelConfig) -> Pooling:
    """As the manifest says it of a model."""
    return Pooling(
        task=stated.task,
        mode=stated.mode,
        normalize=stated.normalize,
        dimensions=config.hidden_size if stated.task == "embed" else 1,
        vocab_size=config.vocab_size,
        similarity=stated.similarity,
        prompts=dict(stated.prompts),
        default_prompt=stated.default_prompt,
    )
