"""Gemma 4: Gemma 3 whose layers differ in their heads, whose last layers read the keys and values
of layers before them, with an input of its own for each layer, and with experts beside the MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, differing
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope
from slipstream.builder.models.decoder import DECODER, EMBEDDING
from slipstream.builder.models.experts import (
    EXPERTS,
    RENORMALIZE,
    TOP_K,
    WIDTH,
    expert_modules,
    experts,
    read_experts,
    write_experts,
)
from slipstream.builder.models.gemma import DEFAULTS, GELU, read_gemma, root
from slipstream.builder.models.gemma2 import LOGITS_CAP, NORMS, logits_cap, read_cap
from slipstream.builder.models.gemma4_decoder import (
    DOUBLE,
    GLOBAL_HEAD,
    GLOBAL_KV_HEADS,
    INPUT,
    K_IS_V,
    MOE,
    SHARED,
    Gemma4Decoder,
    in_layer,
    owns_kv,
)
from slipstream.builder.models.gemma4_gguf import FAMILY
from slipstream.builder.models.huggingface_config import (
    described_ropes,
    head_size,
    layer_kinds,
    read_ropes,
)
from slipstream.builder.models.module import LAYER, Extent, Module, Stack, hidden, one
from slipstream.builder.models.norms import with_norms
from slipstream.weights.json import Fields

_BY_LAYER, _INPUT_VOCABULARY = "per_layer_config", "vocab_size_per_layer_input"
# The keys of their number, their width, and how many a token has.
_EXPERTS = ("num_experts", "moe_intermediate_size", "top_k_experts")
_EVERY = 6  # the last of so many layers sees everything
_IN, _MLP, _ROUTER = "model.per_layer", f"{LAYER}.mlp", f"{LAYER}.router"


def _read(keys: Fields) -> ModelConfig:
    values = dict(keys.values)
    # Images may look ahead; there are none here.
    if values.get("use_bidirectional_attention") == "vision":
        values["use_bidirectional_attention"] = None
    keys = Fields(values, keys.origin)
    layers = keys.integer("num_hidden_layers", minimum=1)
    by_number = [FULL if (i + 1) % _EVERY == 0 else SLIDING for i in range(layers)]
    kinds = (*layer_kinds(keys, by_number)[:-1], FULL)
    head_dim, kv_heads = _global_heads(keys, kinds)
    config = read_gemma(
        keys, keys.choice("hidden_activation", (GELU,)), _ropes(keys, kinds, head_dim)
    )
    _check_heads(keys, config, kv_heads)
    return replace(
        config,
        layer_kinds=kinds,
        sliding_window=keys.integer("sliding_window", minimum=1),
        qk_norm=True,
        extras={
            GLOBAL_HEAD: head_dim,
            GLOBAL_KV_HEADS: kv_heads,
            K_IS_V: keys.flag(K_IS_V),
            SHARED: _shared(keys, kinds),
            DOUBLE: keys.flag(DOUBLE),
            LOGITS_CAP: read_cap(keys, LOGITS_CAP),
            **_inputs(keys),
            **_experts(keys),
        },
    )


def _global_heads(keys: Fields, kinds: tuple[str, ...]) -> tuple[int, int]:
    """Size and number of the k heads of layers that see everything; newer files say by layer what
    is other there than elsewhere."""
    if not keys.has(_BY_LAYER):
        others = keys.flag(K_IS_V) and keys.has(GLOBAL_KV_HEADS)
        count = keys.integer(GLOBAL_KV_HEADS if others else "num_key_value_heads", minimum=1)
        return keys.integer(GLOBAL_HEAD, minimum=1), count
    given = keys.fields_by_name(_BY_LAYER)
    # transformers writes numbers of one length: 05 and 11.
    by_layer = {layer.lstrip("0") or "0": own.values for layer, own in given.items()}
    full = [str(i) for i, kind in enumerate(kinds) if kind == FULL]
    entries = [by_layer.get(layer, {}) for layer in full]
    same = set(by_layer) <= set(full) and all(entry == entries[0] for entry in entries)
    if not same or not set(entries[0]) <= {"head_dim", "num_key_value_heads"}:
        wanted = "head_dim and num_key_value_heads, the same for every layer of full attention"
        raise keys.refusal(_BY_LAYER, f"{wanted} and for no other")
    own = Fields(entries[0], keys.origin, path=f"{_BY_LAYER}.")
    common = keys.integer("num_key_value_heads", minimum=1)
    size = own.integer("head_dim", head_size(keys), minimum=1)
    return size, own.integer("num_key_value_heads", common, minimum=1)


def _check_heads(keys: Fields, config: ModelConfig, kv_heads: int) -> None:
    if config.num_heads % kv_heads:
        wanted = f"a divisor of num_attention_heads {config.num_heads}, not {kv_heads}"
        raise keys.refusal(_BY_LAYER if keys.has(_BY_LAYER) else GLOBAL_KV_HEADS, wanted)


def _ropes(keys: Fields, kinds: tuple[str, ...], head_dim: int) -> dict[str, Rope]:
    """By kind of layer, each of heads of its own size."""
    given = keys.fields("rope_parameters").values
    sizes = {FULL: head_dim, SLIDING: head_size(keys)}
    sizes = {kind: size for kind, size in sizes.items() if kind in kinds or given.get(kind)}
    missing = [kind for kind in sizes if kind not in given]
    if missing:
        raise keys.refusal("rope_parameters", f"an entry for {missing[0]!r}")
    return {kind: read_ropes(keys, size)[kind] for kind, size in sizes.items()}


def _shared(keys: Fields, kinds: tuple[str, ...]) -> int:
    """The last layers, which have no keys: each of a kind that a layer before them has."""
    shared = keys.integer(SHARED, minimum=0)
    if set(kinds[: max(len(kinds) - shared, 0)]) != set(kinds):
        wanted = "so few layers that those before them have one of each kind, with keys to share"
        raise keys.refusal(SHARED, wanted)
    return shared


def _inputs(keys: Fields) -> dict[str, Any]:
    """The input that a token has for each layer; 0 or null for none."""
    width = keys.integer(INPUT, 0, minimum=0)
    vocabulary = keys.integer("vocab_size", minimum=1)
    rows = keys.integer(_INPUT_VOCABULARY, minimum=vocabulary) if width else vocabulary
    return {INPUT: width, _INPUT_VOCABULARY: rows}


def _experts(keys: Fields) -> dict[str, Any]:
    if not keys.flag(MOE):
        return {MOE: False, EXPERTS: 0, TOP_K: 0, WIDTH: 0}
    return {MOE: True, **read_experts(keys, *_EXPERTS), RENORMALIZE: True}


def _write(config: ModelConfig) -> dict[str, Any]:
    extras = config.extras
    full = [i for i, kind in enumerate(config.layer_kinds) if kind == FULL]
    heads = {"head_dim": extras[GLOBAL_HEAD], "num_key_value_heads": extras[GLOBAL_KV_HEADS]}
    own = (K_IS_V, SHARED, DOUBLE, INPUT, _INPUT_VOCABULARY, MOE)
    return {
        "layer_types": list(config.layer_kinds),
        "sliding_window": config.sliding_window,
        "rope_parameters": described_ropes(config, {FULL: extras[GLOBAL_HEAD]}),
        "attention_bias": config.attention_bias,
        "hidden_activation": config.hidden_act,
        "pad_token_id": None,
        LOGITS_CAP: extras[LOGITS_CAP] or None,
        _BY_LAYER: {str(layer): heads for layer in full},
        **{key: extras[key] for key in own},
        **(write_experts(config, *_EXPERTS) if extras[MOE] else {}),
    }


def _input(config: ModelConfig) -> Extent:
    return Extent(config.extras[INPUT])


def _inputs_of_all(config: ModelConfig) -> Extent:
    return Extent(config.num_layers, config.extras[INPUT])


def _input_vocabulary(config: ModelConfig) -> Extent:
    return Extent(config.extras[_INPUT_VOCABULARY])


def _root_of_input(config: ModelConfig) -> float:
    return float(config.extras[INPUT] ** 0.5)


def _has_input(config: ModelConfig, layer: int) -> bool:
    return bool(config.extras[INPUT])


def _has_experts(config: ModelConfig, layer: int) -> bool:
    return bool(config.extras[MOE])


def _has_v(config: ModelConfig, layer: int) -> bool:
    return owns_kv(config, layer) and not (
        config.extras[K_IS_V] and config.layer_kinds[layer] == FULL
    )


def _reads_keys(config: ModelConfig, layer: int) -> bool:
    return not owns_kv(config, layer)


_OWN_KV: dict[str, Any] = {"present": owns_kv, "unread": _reads_keys}


def _norm(name: str, gguf: str, present: Callable[[ModelConfig, int], bool]) -> Module:
    return Module(f"{LAYER}.{name}", "norm", (hidden,), present=present, gguf=f"blk.{{i}}.{gguf}")


def _stacked(module: Module) -> Module:
    """The experts as checkpoints hold them, beside the MLP, with a norm of what they give."""
    last, block = module.name.rpartition(".")[2], f"{_MLP}."
    part = {"gate_proj": 0, "up_proj": 1}.get(last)
    stacked = f"{LAYER}.experts.{'down' if part is None else 'gate_up'}_proj"
    stack = Stack(stacked) if part is None else Stack(stacked, part, 2)
    assert module.reads is not None
    return replace(
        module,
        name=module.name.replace(block, f"{LAYER}."),
        reads=module.reads.replace(block, f"{LAYER}."),
        stream=f"{LAYER}.post_feedforward_layernorm_2" if module.stream else None,
        present=_has_experts,
        stack=stack,
    )


_INPUTS = (
    Module(
        "model.embed_tokens_per_layer",
        "embedding",
        (_input_vocabulary,),
        _inputs_of_all,
        present=_has_input,
        scale=_root_of_input,
        gguf="per_layer_token_embd",
    ),
    Module(
        f"{_IN}_model_projection",
        "linear",
        (_inputs_of_all,),
        hidden,
        present=_has_input,
        gguf="per_layer_model_proj",
    ),
    Module(
        f"{_IN}_projection_norm", "norm", (_input,), present=_has_input, gguf="per_layer_proj_norm"
    ),
)
_BESIDE_THE_MLP = (
    _norm("post_feedforward_layernorm_1", "post_ffw_norm_1", _has_experts),
    Module(
        f"{_ROUTER}.scale", "router", (hidden,), bare=True, present=_has_experts,
        gguf="blk.{i}.ffn_gate_inp.scale",
    ),
    Module(
        f"{_ROUTER}.proj", "router", (experts,), hidden, present=_has_experts,
        gguf="blk.{i}.ffn_gate_inp",
    ),
    Module(
        f"{_ROUTER}.per_expert_scale", "router", (experts,), bare=True, present=_has_experts,
        gguf="blk.{i}.ffn_down_exps.scale",
    ),
    _norm("pre_feedforward_layernorm_2", "pre_ffw_norm_2", _has_experts),
    *(_stacked(m) for m in expert_modules("mlp") if m.role == "expert"),
    _norm("post_feedforward_layernorm_2", "post_ffw_norm_2", _has_experts),
)  # fmt: skip
_OWN_INPUT = (
    Module(
        f"{LAYER}.per_layer_input_gate",
        "linear",
        (_input,),
        hidden,
        present=_has_input,
        gguf="blk.{i}.inp_gate",
    ),
    Module(
        f"{LAYER}.per_layer_projection",
        "linear",
        (hidden,),
        _input,
        present=_has_input,
        stream=f"{LAYER}.post_per_layer_input_norm",
        gguf="blk.{i}.proj",
    ),
    _norm("post_per_layer_input_norm", "post_norm", _has_input),
    Module(
        f"{LAYER}.layer_scalar", "norm", (one,), bare=True,
        gguf="blk.{i}.layer_output_scale.weight",
    ),
)  # fmt: skip


def _table() -> tuple[Module, ...]:
    rows = differing(
        with_norms(DECODER, NORMS),
        embed_tokens={"scale": root},
        k_proj=_OWN_KV,
        v_proj={"present": _has_v, "unread": _reads_keys},
        k_norm=_OWN_KV,
        o_proj={"reads": None},  # a norm of v heads takes scales of channels away
        lm_head={"cap": logits_cap},
    )
    after = {
        EMBEDDING.name: _INPUTS,
        f"{_MLP}.down_proj": _BESIDE_THE_MLP,
        f"{LAYER}.{NORMS.after_mlp}": _OWN_INPUT,
    }
    return tuple(row for module in rows for row in (module, *after.get(module.name, ())))


ARCHITECTURE = Architecture(
    name="gemma4_text",
    decoder=Gemma4Decoder,
    modules=_table(),
    defaults={
        **DEFAULTS,
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": GELU,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
        LOGITS_CAP: None,
        GLOBAL_HEAD: 512,
        SHARED: 0,
        K_IS_V: False,
        DOUBLE: False,
        INPUT: 256,
        _INPUT_VOCABULARY: 262144,
        MOE: False,
    },
    read=_read,
    write=_write,
    gguf=FAMILY,
    in_layer=in_layer,
    kv_head_counts=(GLOBAL_KV_HEADS,),
)
