"""Heads of SpecForge and speculators, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.eagle3_heads import (
    MASK_TOKEN,
    Arrays,
    random_tensors,
    save_head,
    specforge,
    speculators,
)

from slipstream.builder.build import plan
from slipstream.builder.checkpoints.huggingface.head import open_head
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError, SlipstreamError


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (specforge(), (2, 3, 1)),
        (specforge(eagle_config={"eagle_aux_hidden_state_layer_ids": [2, 1, 3]}), (2, 1, 3)),
        (specforge(eagle_config=None), None),
        (speculators({}), (1, 2, 3)),
    ],
)
def test_where_states_come_from(
    config: dict[str, Any], layers: tuple[int, ...] | None, tmp_path: Path
) -> None:
    head = open_head(save_head(tmp_path, config, random_tensors(config)))
    assert head.layers == layers
    assert head.mask_token is None
    assert head.config.hidden_size == 64 and head.config.extras["num_states"] == 3
    assert not head.config.tie_word_embeddings
    assert head.config.extras["norm_before_residual"] == ("speculators_model_type" in config)


def test_tokens_are_offsets(tmp_path: Path) -> None:
    config, tensors = specforge(), random_tensors(specforge())
    head = open_head(save_head(tmp_path, config, tensors))
    assert head.tokens is not None and head.tokens.dtype == np.int32
    assert head.tokens.tolist() == np.flatnonzero(tensors["t2d"]).tolist()


def without(tensors: Arrays, *names: str) -> Arrays:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


TENSORS = random_tensors(specforge())
OTHERS = {"fc.bias": np.zeros(64, np.float32)}
MASK = {"mask_hidden": np.zeros((1, 192), np.float32)}
UNEVEN = {"fc.weight": np.zeros((64, 130), np.float32)}
LATE = {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}
REFUSED: list[tuple[dict[str, Any], Arrays, str]] = [
    (specforge(), without(TENSORS, "fc.weight"), "is no EAGLE-3 head: it has no fc.weight"),
    (specforge(), without(TENSORS, "d2t"), "knows 100 of 320 tokens and has no tensor d2t"),
    (specforge(), {**TENSORS, "d2t": TENSORS["d2t"][:9]}, r"d2t is I64 \[9\], not I64 \[100\]"),
    (specforge(), {**TENSORS, "d2t": TENSORS["d2t"] + 300}, "d2t leads to tokens from 301 to"),
    (specforge(), without(TENSORS, "norm.weight"), "has no tensor 'model.norm.weight'"),
    (specforge(), {**TENSORS, **OTHERS}, "holds 1 tensors that .* not read, such as model.fc.bias"),
    (specforge(), {**TENSORS, **UNEVEN}, "reads 2 states, after layers 2, 3, 1 of 3"),
    (specforge(), {**TENSORS, **MASK}, "pard_token is None; expected the token of places"),
    (specforge(pard_token=320), {**TENSORS, **MASK}, "at most 319"),
    (specforge(pard_token=5), {**TENSORS, "mask_hidden": np.zeros(9, np.float32)}, r"shape \[9\]"),
    (specforge(eagle_config={"use_aux_hidden_state": False}), TENSORS, "reads several layers"),
    (specforge(eagle_config=LATE), TENSORS, "after layers 0, 2, 4 of 3"),
    (specforge(model_type="deepseek_v3"), TENSORS, "expected one of llama, qwen3"),
    (specforge(vocab_size=400), TENSORS, "it is for 400 tokens, and the model has 320"),
    (specforge(quantization_config={"quant_method": "fp8"}), TENSORS, "heads are read dense only"),
    (specforge(intermediate_size=64), TENSORS, r"has shape \[96, 64\], but by the config"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED)
def test_a_head_that_does_not_fit_is_refused(
    config: dict[str, Any], tensors: Arrays, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    head = save_head(tmp_path / "head", config, tensors)
    with pytest.raises(SlipstreamError, match=message):
        plan(tiny_checkpoint, BuildOptions(target="cpu", speculative_model=str(head)))


def test_a_narrow_head_needs_an_embedding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = specforge(hidden_size=48, target_hidden_size=64)
    head = save_head(tmp_path / "head", config, random_tensors(config))
    with pytest.raises(BuildError, match="it has no embedding, and is not as wide"):
        plan(tiny_checkpoint, BuildOptions(target="cpu", speculative_model=str(head)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt"}, "engines of target tensorrt run one graph"),
        ({"task": "embed"}, "makes no text that could be guessed"),
    ],
)
def test_where_no_head_runs(
    options: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    head = save_head(tmp_path / "head", specforge(), TENSORS)
    with pytest.raises(BuildError, match=message):
        plan(tiny_checkpoint, BuildOptions(**options, speculative_model=str(head)))


def test_target_and_head_share_an_embedding_of_one_form(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Rounded ones, too; the other weights of the head have names of their own."""
    config = specforge(pard_token=MASK_TOKEN)
    head = save_head(tmp_path / "head", config, {**TENSORS, **MASK})
    for quantization in ("none", "int8_wo", "int4_wo"):
        made = plan(
            tiny_checkpoint,
            BuildOptions(target="cpu", quantization=quantization, speculative_model=str(head)),
        )
        names = [part.name for weight in made.weights for part in weight.parts]
        assert len(names) == len(set(names))
        assert [n for n in names if "embed_tokens" in n] == ["model.embed_tokens.weight.packed"]
        own = [name for program in (made.head_program,) if program for name in program.stored]
        assert all(name.startswith(("head.", "model.embed")) for name in own)
        assert made.head is not None and made.head.kind == "p-eagle"
        assert [cache.name for cache in made.caches] == ["kv", "head"]
