"""A model's layers as transformers defines them, without weights: one is filled at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slipstream.builder.models.config import ModelConfig, RopeScaling
from slipstream.errors import CheckpointError

KVHook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_ATTENTION = "slipstream_quantize"
# Which of RopeScaling's fields a kind of rope has in transformers; "kind" is named apart.
_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclass(slots=True)
class _Sight:
    """What an attention module is told besides its weights: its window, and who sees k and v."""

    window: int
    kv: KVHook | None = None


class Skeleton:
    """The decoder of a configuration on torch's meta device.

    ``layers`` are decoder layers of transformers without weights. Raises CheckpointError for a
    configuration that transformers cannot express.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
        self.config = config
        self.dtype = dtype
        described = transformers_config(config)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                described, attn_implementation=_ATTENTION, dtype=dtype
            )
        model.eval()
        self.layers: tuple[nn.Module, ...] = tuple(model.model.layers)
        self.norm: nn.Module = model.model.norm
        # Built anew because its frequencies are no weights: on the meta device they are lost.
        self._rotary: nn.Module = type(model.model.rotary_emb)(described)
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                if hasattr(module, "is_causal"):
                    module.sight = _Sight(config.window(index))  # type: ignore[assignment]

    @contextmanager
    def filled(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Layer ``index`` with these weights, named as in the layer, until the block ends.

        A linear has a bias exactly if ``weights`` has one.
        """
        layer = self.layers[index]
        fill(layer, weights)
        try:
            yield layer
        finally:
            layer.to_empty(device="meta")

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """A filled layer on hidden states ``[B, T, hidden]``, positions from 0."""
        positions = torch.arange(hidden.shape[1])[None]
        angles = self._rotary(hidden, position_ids=positions)
        out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=angles)
        return cast("Tensor", out[0] if isinstance(out, tuple) else out)


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives a module of the meta device its weights, and its linears the biases among them."""
    for name, linear in linears(module).items():
        bias = weights.get(f"{name}.bias")
        given = None if bias is None else nn.Parameter(bias, requires_grad=False)
        linear.bias = given  # type: ignore[assignment]
    module.load_state_dict(dict(weights), strict=True, assign=True)
    module.requires_grad_(False)


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every linear by its name in the module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def watch_kv(layer: nn.Module, hook: KVHook | None) -> None:
    """Lets ``hook`` see, and replace, the keys and values ``[B, H, T, D]`` that a cache would
    hold, keys after their rotation."""
    for module in layer.modules():
        sight = getattr(module, "sight", None)
        if isinstance(sight, _Sight):
            sight.kv = hook


def transformers_config(config: ModelConfig) -> PreTrainedConfig:
    """The configuration class of transformers with this model's numbers."""
    if config.rotary_dim != config.head_dim:
        raise CheckpointError(
            f"{config.rotary_dim} of {config.head_dim} elements of a head are rotated, which "
            "transformers' layers of this architecture do not do; such a model cannot be calibrated"
        )
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        "rope_parameters": _rope(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": False,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    return AutoConfig.for_model(config.architecture, **fields)


def _rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    fields = {name: getattr(scaling, name) for name in _ROPE_FIELDS[scaling.kind]}
    given = {name: value for name, value in fields.items() if value is not None}
    return {"rope_type": scaling.kind, "rope_theta": theta, **given}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention of ``[B, H, T, D]``; transformers' signature, ours in the mask."""
    sight = cast("_Sight", module.sight)
    if sight.kv is not None:
        key, value = sight.kv(key, value)
    length = query.shape[2]
    mask = None
    if 0 < sight.window < length:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < sight.window)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None
