"""ERNIE 4.5 with experts: pairs of neighbours turn, and experts are chosen by corrected scores of a
softmax."""

from dataclasses import replace
from functools import partial
from typing import Any

import onnx_ir as ir

from slipstream.builder.graph.ops import Routes
from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    CORRECTION,
    DENSE_LAYERS,
    RENORMALIZE,
    WIDTH,
    ExpertDecoder,
    expert_modules,
    experts,
    gguf_keys,
    in_some_layers,
    read_experts,
    shared_modules,
    write_experts,
)
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.builder.models.module import (
    LAYER,
    Extent,
    Module,
    everywhere,
    hidden,
    nowhere,
    one,
)
from slipstream.weights.json import Fields
from slipstream.weights.tensor import LazyTensor, QuantTensor

_COUNT, _CHOSEN, _WIDTH = "moe_num_experts", "moe_k", "moe_intermediate_size"
_START, _END, _EVERY = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"
_SHARED, _LEAST, _BIASES = "moe_num_shared_experts", "moe_norm_min", "use_bias"
_NOTHING = 1e-12  # far below what the scores of the chosen add up to
# Names that transformers reads, too, and prefers.
_OTHERS = {_COUNT: "num_experts", _CHOSEN: "num_experts_per_tok"}
_STATICS = f"mlp.moe_statics.{CORRECTION}"


class Ernie45MoeDecoder(ExpertDecoder):
    """The correction lies beside the router, in a matrix of one row."""

    shared = "mlp.shared_experts"

    def routes(self, x: ir.Value, router: str) -> Routes:
        """The experts of each token."""
        correction = self.tensor(router.removesuffix("mlp.gate") + _STATICS)
        return self.ops.router(self.linear(x, router), self.routing(), _row(correction))


def _row(matrix: LazyTensor) -> LazyTensor:
    """The row of a matrix that has one."""
    form = replace(matrix.format, shape=matrix.format.shape[1:])

    def load() -> QuantTensor:
        loaded = matrix.load()
        return replace(loaded, format=form, codes=loaded.codes[0])

    return LazyTensor(matrix.name, form, load)


def read(keys: Fields) -> ModelConfig:
    """The experts, and which layers have them; no biases, one of which would be the head's."""
    if keys.flag(_BIASES):
        raise keys.refusal(_BIASES, "false, as a head with a bias is not supported")
    if keys.number(_LEAST) > _NOTHING:
        raise keys.refusal(_LEAST, f"at most {_NOTHING}, which never bounds a sum of scores")
    config = read_decoder(keys)
    layers = config.num_layers
    start, every = keys.integer(_START, minimum=0), keys.integer(_EVERY, minimum=1)
    end = keys.integer(_END, minimum=-1)
    end = layers - 1 if end == -1 else end
    sparse = {i for i in range(start, min(end + 1, layers)) if (i + 1) % every == 0}
    count, chosen = (other if keys.has(other) else own for own, other in _OTHERS.items())
    return replace(
        config,
        extras={
            **read_experts(keys, count, _WIDTH, chosen),
            RENORMALIZE: True,
            DENSE_LAYERS: [i for i in range(layers) if i not in sparse],
            _SHARED: keys.integer(_SHARED, minimum=0),
            _START: start,
            _END: end,
            _EVERY: every,
        },
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The experts and their layers."""
    extras = config.extras
    return {
        **write_experts(config, _COUNT, _WIDTH, _CHOSEN),
        **{key: extras[key] for key in (_SHARED, _START, _END, _EVERY)},
    }


def _shared_inner(config: ModelConfig) -> Extent:
    return Extent(config.extras[_SHARED] * config.extras[WIDTH])


def _has_shared(config: ModelConfig, layer: int) -> bool:
    return bool(config.extras[_SHARED]) and layer not in config.extras[DENSE_LAYERS]


_STATICS_ROW = Module(
    f"{LAYER}.{_STATICS}", "router", (one,), experts, bare=True, gguf="blk.{i}.exp_probs_b.bias"
)
_SHARED_ROWS = (
    replace(row, present=_has_shared) for row in shared_modules("mlp.shared_experts", _shared_inner)
)
# A further layer, which predicts the token after the next.
_unread = partial(Module, rows=(hidden,), present=nowhere, unread=everywhere)
_PREDICTOR = (
    *(
        _unread(row.name.replace(LAYER, "model.mtp_block.{i}"), row.role)
        for row in DECODER
        if row.name.startswith(LAYER)
    ),
    _unread("model.mtp_emb_norm.{i}", "norm"),
    _unread("model.mtp_hidden_norm.{i}", "norm"),
    _unread("model.mtp_linear_proj.{i}", "linear"),
)

ARCHITECTURE = Architecture(
    name="ernie4_5_moe",
    decoder=Ernie45MoeDecoder,
    modules=(
        *in_some_layers(
            differing(DECODER, q_proj={"neighbours": True}, k_proj={"neighbours": True}),
            (*expert_modules("mlp"), _STATICS_ROW),
        ),
        *_SHARED_ROWS,
        *_PREDICTOR,
    ),
    defaults={
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        _BIASES: False,
        _COUNT: 64,
        _CHOSEN: 6,
        _WIDTH: 1536,
        _SHARED: 2,
        _START: 1,
        _END: -1,
        _EVERY: 1,
        _LEAST: 1e-12,
    },
    read=read,
    write=write,
    gguf=GGUFFamily(
        "ernie4_5-moe",
        keys={
            **gguf_keys(_COUNT, _WIDTH, _CHOSEN),
            _SHARED: "expert_shared_count",
            _START: "leading_dense_block_count",
            _EVERY: "interleave_moe_layer_step",
        },
    ),
)
