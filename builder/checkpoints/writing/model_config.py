"""The config.json of a checkpoint: the source's own, or one made of what a GGUF file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from slipstream.builder.checkpoints.base import Checkpoint, read_json
from slipstream.builder.models.config import ModelConfig, RopeScaling

_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
)
# Which of RopeScaling's fields transformers reads for a kind.
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_ORIGINAL = "original_max_position_embeddings"
_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", _ORIGINAL, *_YARN),
    }
)


def source_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """A config.json without quantization; ``dtype`` is that of the dense weights."""
    path = checkpoint.path / "config.json"
    config = read_json(path) if path.is_file() else describe(checkpoint.config)
    config = {key: value for key, value in config.items() if key not in _REPLACED}
    return {**config, "dtype": dtype}


_REPLACED = ("quantization_config", "compression_config", "torch_dtype", "dtype")


def describe(config: ModelConfig) -> dict[str, Any]:
    """A Hugging Face ``config.json`` that is read as this configuration."""
    partial = config.rotary_dim / config.head_dim
    rope = _rope(config.rope_theta, config.rope_scaling)
    eos = config.eos_token_ids
    return {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope | ({} if partial == 1 else {"partial_rotary_factor": partial}),
        "hidden_act": config.hidden_act,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        **_sliding(config),
    }


def _rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    values = asdict(scaling)
    given = {name: values[name] for name in _ROPE_FIELDS[scaling.kind]}
    return {
        "rope_type": scaling.kind,
        "rope_theta": theta,
        **{name: value for name, value in given.items() if value is not None},
    }


def _sliding(config: ModelConfig) -> dict[str, Any]:
    if config.architecture == "mistral":
        return {"sliding_window": config.sliding_window}
    if config.sliding_window is None:
        return {}
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": True,
        "layer_types": [kinds[sliding] for sliding in config.sliding_layers],
    }
