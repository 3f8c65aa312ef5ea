"""Random EAGLE-3 heads for the tiny model, in the files of SpecForge and speculators, and what such
a head computes, in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tests.tiny_models import TINY_SHAPE

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]
LAYERS = (1, 2, 3)  # of the tiny model, whose states heads read
MASK_TOKEN = 5
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": TINY_SHAPE["vocab_size"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 256,
}
SPECFORGE: dict[str, Any] = {
    **SHAPE,
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": 100,
    "tie_word_embeddings": True,
    # By the index of the layer whose output it is.
    "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 0]},
}


def specforge(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - keys of config.json
    """A config.json of SpecForge; its states are those after layers 2, 3 and 1."""
    return {**SPECFORGE, **changes}


def speculators(layers: dict[str, Any], **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """A config.json of speculators with these changes of its layers, and of the rest."""
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {**SHAPE, **layers},
        "draft_vocab_size": 100,
        "eagle_aux_hidden_state_layer_ids": list(LAYERS),
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "tiny"}},
        **changes,
    }


def random_tensors(config: dict[str, Any], seed: int = 0, *, embedding: bool = False) -> Arrays:
    """Weights by the names of speculators' files."""
    rng, shape = np.random.default_rng(seed), {**SHAPE, **layers_of(config)}
    width, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    target, known = config.get("target_hidden_size", width), config["draft_vocab_size"]
    states, heads = 3 * target, shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    sizes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, states),
        "norm.weight": (width,),
        "lm_head.weight": (known, width),
        "layers.0.hidden_norm.weight": (width,),
    }
    for layer in range(shape["num_hidden_layers"]):
        seen, name = width * (2 if layer == 0 else 1), f"layers.{layer}."
        sizes |= {
            f"{name}input_layernorm.weight": (width,),
            f"{name}post_attention_layernorm.weight": (width,),
            f"{name}self_attn.q_proj.weight": (heads, seen),
            f"{name}self_attn.k_proj.weight": (kv, seen),
            f"{name}self_attn.v_proj.weight": (kv, seen),
            f"{name}self_attn.o_proj.weight": (width, heads),
            f"{name}mlp.gate_proj.weight": (inner, width),
            f"{name}mlp.up_proj.weight": (inner, width),
            f"{name}mlp.down_proj.weight": (width, inner),
        }
    if config.get("norm_before_fc"):
        sizes["input_norm.weight"] = (states,)
    if config.get("fc_norm"):
        sizes |= {f"fc_norm.{number}.weight": (target,) for number in range(3)}
    if embedding:
        sizes["embed_tokens.weight"] = (vocab, width)
    tensors: Arrays = {
        name: (rng.normal(0, 0.15, size) + (len(size) == 1)).astype(np.float32)
        for name, size in sizes.items()
    }
    tokens = np.sort(rng.choice(vocab, known, replace=False))
    return {**tensors, "d2t": tokens - np.arange(known), "t2d": np.isin(np.arange(vocab), tokens)}


def save_head(directory: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    """Write a head; that of SpecForge calls its first layer otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    if "speculators_model_type" not in config:
        tensors = {name.replace("layers.0.", "midlayer."): x for name, x in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def layers_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is of the layers."""
    inside: dict[str, Any] = config.get("transformer_layer_config", config)
    return inside


def fused(config: dict[str, Any], tensors: Arrays, states: list[NDArray[Any]]) -> Floats:
    """What a head takes of tokens whose states are these, ``[T, width]``."""
    parts = [state.astype(np.float64) for state in states]
    if config.get("fc_norm"):
        parts = [_norm(x, tensors[f"fc_norm.{i}.weight"]) for i, x in enumerate(parts)]
    x = np.concatenate(parts, axis=1)
    if config.get("norm_before_fc"):
        x = _norm(x, tensors["input_norm.weight"])
    made: Floats = x @ tensors["fc.weight"].T
    return made


def forward(
    config: dict[str, Any], tensors: Arrays, embedded: NDArray[Any], hidden: Floats
) -> tuple[Floats, Floats]:
    """Logits ``[T, known]`` and what is fed back ``[T, width]``, of tokens from position 0 on."""
    shape, x = {**SHAPE, **layers_of(config)}, hidden
    wrapped = "speculators_model_type" in config
    for layer in range(shape["num_hidden_layers"]):
        name = f"layers.{layer}."
        normed = _norm(x, tensors[f"{name}{'input_layernorm' if layer else 'hidden_norm'}.weight"])
        if layer == 0:
            x = normed if config.get("norm_before_residual", wrapped) else x
            own = _norm(embedded, tensors[f"{name}input_layernorm.weight"])
            normed = np.concatenate([own, normed], axis=1)
        x = x + _attention(shape, tensors, f"{name}self_attn.", normed, layer)
        normed = _norm(x, tensors[f"{name}post_attention_layernorm.weight"])
        gate = normed @ tensors[f"{name}mlp.gate_proj.weight"].T
        up = normed @ tensors[f"{name}mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{name}mlp.down_proj.weight"].T
    normed = _norm(x, tensors["norm.weight"])
    fed_back = normed if config.get("norm_output") else x
    return normed @ tensors["lm_head.weight"].T, fed_back


def _attention(shape: dict[str, Any], tensors: Arrays, name: str, x: Floats, layer: int) -> Floats:
    length, size = len(x), shape["head_dim"]
    q, k, v = (
        (x @ tensors[f"{name}{letter}_proj.weight"].T).reshape(length, -1, size) for letter in "qkv"
    )
    place = np.arange(length)
    angles = place[:, None] * shape["rope_theta"] ** (-np.arange(0, size, 2) / size)
    q, k = (_rotated(each, angles[:, None]) for each in (q, k))
    group = shape["num_attention_heads"] // shape["num_key_value_heads"]
    k, v = (each.repeat(group, axis=1) for each in (k, v))
    behind = place[:, None] - place
    kinds = shape.get("layer_types", ["full_attention"] * (layer + 1))
    window = shape["sliding_window"] if kinds[layer] == "sliding_attention" else length
    seen = (behind >= 0) & (behind < window)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
    made: Floats = attended @ tensors[f"{name}o_proj.weight"].T
    return made


def _norm(x: NDArray[Any], weight: NDArray[Any]) -> Floats:
    normed: Floats = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + SHAPE["rms_norm_eps"]) * weight
    return normed


def _rotated(x: Floats, angles: Floats) -> Floats:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
