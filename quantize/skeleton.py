"""A model's layers as transformers defines them, without weights: one is filled at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.huggingface_config import describe
from slipstream.cores import usable_cores
from slipstream.errors import CheckpointError
from slipstream.quantize.experts import split_experts

KV = tuple[Tensor, Tensor]
KVHook = Callable[[Tensor, Tensor], KV]
_ATTENTION = "slipstream_quantize"
# What transformers' models have that make an input for each layer from the embedded tokens.
INPUT_MODULES = ("per_layer_model_projection", "per_layer_projection_norm")


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """A text between two layers.

    hidden  ``[1, T, hidden]``.
    inputs  what each layer takes besides, ``[1, T, layers, width]``; None where none does.
    shared  keys and values that layers to come read of layers that were, by the kind of layer.
    """

    hidden: Tensor
    inputs: Tensor | None = None
    shared: Mapping[str, KV] = field(default_factory=dict)


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
            model: Any = AutoModelForCausalLM.from_config(
                described, attn_implementation=_ATTENTION, dtype=dtype
            )
        model.eval()
        self._model = model.model
        self.layers: tuple[nn.Module, ...] = tuple(model.model.layers)
        self._shares = _takes(self.layers[0], "shared_kv_states")
        self.norm: nn.Module = model.model.norm
        self._rotary: nn.Module | None = None
        if model.model.rotary_emb is not None:
            # Built anew because its frequencies are no weights: on the meta device they are lost.
            self._rotary = type(model.model.rotary_emb)(described)
            _check_rotation(self._rotary, config)
        self._by_kind = _takes(self._rotary, "layer_type")
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

    def inputs(self, weights: Mapping[str, Tensor], hidden: Tensor, rows: Tensor) -> Tensor:
        """What each layer takes besides, ``[1, T, layers, width]``, of embedded tokens
        ``[1, T, hidden]`` and their ``rows [1, T, layers * width]`` of the table of all layers.

        ``weights`` are those of ``INPUT_MODULES``, by their name there.
        """
        for name in INPUT_MODULES:
            given = {"weight": weights[f"{name}.weight"]}
            self._model.get_submodule(name).load_state_dict(given, assign=True)
        by_layer = rows.view(*rows.shape[:-1], len(self.layers), -1)
        return cast("Tensor", self._model.project_per_layer_inputs(hidden, by_layer))

    def run(self, layer: nn.Module, states: States) -> States:
        """A filled layer, positions from 0."""
        index, hidden, shared = self.layers.index(layer), states.hidden, dict(states.shared)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self._rotary
        of_kind = {"layer_type": self.config.layer_kinds[index]} if self._by_kind else {}
        angles = None if rotary is None else rotary(hidden, position_ids=positions, **of_kind)
        more: dict[str, Any] = {"shared_kv_states": shared} if self._shares else {}
        if states.inputs is not None:
            more["per_layer_input"] = states.inputs[:, :, index]
        out = layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=angles,
            **more,
        )
        return States(out[0] if isinstance(out, tuple) else out, states.inputs, shared)


def _takes(module: nn.Module | None, name: str) -> bool:
    """Whether a module is called with an argument of this name."""
    return module is not None and name in inspect.signature(module.forward).parameters


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    module, dot, part = name.rpartition(".")
    return f"{renamed.get(module, module)}{dot}{part}"


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
