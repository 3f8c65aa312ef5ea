"""A model's layers as transformers defines them, without weights: one is filled at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.huggingface_config import describe
from slipstream.cores import usable_cores
from slipstream.errors import CheckpointError
from slipstream.quantize.experts import split_experts

KVHook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_ATTENTION = "slipstream_quantize"


@dataclass(slots=True)
class _Sight:
    """What an attention module is told besides its weights: its window, and who sees k and v."""

    window: int
    kv: KVHook | None = None


class Skeleton:
    """The decoder of a configuration on torch's meta device.

    ``layers`` are decoder layers of transformers without weights, whose experts are linears like
    others. Raises CheckpointError for a configuration that transformers cannot express.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        # torch knows OMP_NUM_THREADS and no quota.
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
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
        self._rotary: nn.Module | None = None
        if model.model.rotary_emb is not None:
            # Built anew because its frequencies are no weights: on the meta device they are lost.
            self._rotary = type(model.model.rotary_emb)(described)
            _check_rotation(self._rotary, config)
        self._renamed = [split_experts(layer, config, i) for i, layer in enumerate(self.layers)]
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                if hasattr(module, "is_causal"):
                    module.sight = _Sight(config.window(index))  # type: ignore[assignment]

    @contextmanager
    def filled(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Layer ``index`` with these weights, named as in the layer, until the block ends.

        A linear has a bias exactly if ``weights`` has one.
        """
        layer, renamed = self.layers[index], self._renamed[index]
        fill(layer, {_renamed(name, renamed): tensor for name, tensor in weights.items()})
        try:
            yield layer
        finally:
            layer.to_empty(device="meta")

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """A filled layer on hidden states ``[B, T, hidden]``, positions from 0."""
        positions = torch.arange(hidden.shape[1])[None]
        kind = self.config.layer_kinds[self.layers.index(layer)]
        of_kind = {"layer_type": kind} if self.config.ropes else {}
        rotary = self._rotary
        angles = None if rotary is None else rotary(hidden, position_ids=positions, **of_kind)
        out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=angles)
        return cast("Tensor", out[0] if isinstance(out, tuple) else out)


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    module, _, part = name.rpartition(".")
    return f"{renamed.get(module, module)}.{part}"


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
    """The configuration class of transformers with this model's numbers, the head apart from the
    embedding."""
    if not architecture_of(config.architecture).alone:
        raise CheckpointError(
            f"layers of {config.architecture} read more than the layer before them gives, such as "
            "keys of other layers, so they cannot be run one by one to calibrate and to measure; "
            "build an engine of the dense checkpoint with --quantization instead"
        )
    try:
        return AutoConfig.for_model(**{**describe(config), "tie_word_embeddings": False})
    except (ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers cannot run a model of type {config.architecture} with this "
            f"configuration ({error}), and its layers are needed to calibrate and to measure; "
            "build an engine of the dense checkpoint instead"
        ) from error


def _check_rotation(rotary: nn.Module, config: ModelConfig) -> None:
    found = {
        2 * len(values)
        for name, values in rotary.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }
    expected = {config.rope(layer).dim for layer in range(config.num_layers)}
    if found != expected:
        raise CheckpointError(
            f"{sorted(expected)} of {config.head_dim} elements of a head are rotated, which "
            "transformers' layers of this architecture do not do; such a model cannot be calibrated"
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention of ``[B, H, T, D]``; transformers' signature, ours in the mask. ``s_aux``
    are sinks."""
    sight = cast("_Sight", module.sight)
    if sight.kv is not None:
        key, value = sight.kv(key, value)
    length = query.shape[2]
    mask = None
    if 0 < sight.window < length:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < sight.window)
    if softcap is None and s_aux is None:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    else:
        out = _plain_attention(query, key, value, mask, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what torch's own does not know: scores within ``cap``, and a score of every
    head, ``sinks``, that takes its part of the weights and adds nothing."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sunk = sinks[:, None, None].expand(*scores.shape[:-1], 1).to(scores.dtype)
        scores = torch.cat((scores, sunk), -1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :length]
    return weights.to(query.dtype) @ value
