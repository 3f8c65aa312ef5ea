"""Where scales can be folded, and that folding leaves a function as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import LLAMA, llama_tensors, save_llama
from torch import Tensor

from slipstream.builder import models
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.models.architecture import Architecture, differing, stacked
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.llama import ARCHITECTURE as LLAMA_ARCHITECTURE
from slipstream.builder.models.module import LAYER, Extent, Module, hidden
from slipstream.errors import CheckpointError
from slipstream.quantize.folding import Folding
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import make_plan
from slipstream.quantize.sites import Site, Source, layer_sites
from slipstream.quantize.skeleton import Skeleton

ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkv")
LINEARS = (*ATTENTION, "self_attn.o_proj", *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
CONFIG = ModelConfig.from_huggingface(LLAMA)


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelConfig]:
    """Gives Llama another table."""

    def declared(modules: tuple[Module, ...]) -> ModelConfig:
        architecture: Architecture = replace(LLAMA_ARCHITECTURE, modules=modules)
        monkeypatch.setattr(models, "load", lambda *_: architecture)
        return CONFIG

    return declared


def test_the_sites_of_a_plain_layer() -> None:
    norm, mlp = "input_layernorm", "post_attention_layernorm"
    assert layer_sites(CONFIG, 1, LINEARS) == (
        Site(ATTENTION, Source(norm, 0, Extent(128))),
        Site(("self_attn.o_proj",), Source("self_attn.v_proj", 0, Extent(2, 32)), mlp),
        Site(("mlp.gate_proj", "mlp.up_proj"), Source(mlp, 0, Extent(128))),
        Site(("mlp.down_proj",), Source("mlp.up_proj", 0, Extent(256)), ""),
    )


def test_what_the_table_does_not_know_is_a_site_without_a_source() -> None:
    sites = layer_sites(CONFIG, 0, ("mlp.extra", "mlp.down_proj"))
    assert [(site.linears, site.source is None) for site in sites] == [
        (("mlp.down_proj",), False),
        (("mlp.extra",), True),
    ]


def test_without_a_norm_before_them_linears_share_x_and_fold_nowhere(
    declare: Callable[..., ModelConfig],
) -> None:
    config = declare(differing(DECODER, **{f"{x}_proj": {"reads": LAYER} for x in "qkv"}))
    first = layer_sites(config, 0, LINEARS)[0]
    assert first == Site(ATTENTION, None)


def test_folding_into_rows_of_a_stacked_weight(declare: Callable[..., ModelConfig]) -> None:
    config = declare(stacked(DECODER, "qkv_proj", ("q_proj", "k_proj", "v_proj")))
    qkv, o = layer_sites(config, 0, ("self_attn.qkv_proj", "self_attn.o_proj"))
    assert qkv.source == Source("input_layernorm", 0, Extent(128))
    assert o.source == Source("self_attn.qkv_proj", 128 + 64, Extent(2, 32))
    generator = torch.Generator().manual_seed(0)
    weights = {
        "self_attn.qkv_proj.weight": torch.randn(256, 128, generator=generator),
        "self_attn.qkv_proj.bias": torch.randn(256, generator=generator),
        "self_attn.o_proj.weight": torch.randn(128, 128, generator=generator),
    }
    x = torch.randn(5, 128, generator=generator)

    def attended() -> Tensor:
        """The values of each head twice, as two query heads that look at one token see them."""
        qkv = x @ weights["self_attn.qkv_proj.weight"].t() + weights["self_attn.qkv_proj.bias"]
        values = qkv[:, 192:].reshape(5, 2, 1, 32).expand(5, 2, 2, 32).reshape(5, 128)
        return torch.cat((qkv[:, :192], values @ weights["self_attn.o_proj.weight"].t()), 1)

    before, folding = attended(), Folding(weights, {})
    kept = weights["self_attn.qkv_proj.weight"].clone()
    assert o.source is not None
    scales = folding.tied(o.source, torch.rand(128, generator=generator) + 0.5)
    folding.fold(o, o.source, folding.possible(o, o.source, scales))
    changed = (weights["self_attn.qkv_proj.weight"] != kept).any(dim=1)
    assert changed.tolist() == [False] * 192 + [True] * 64
    torch.testing.assert_close(attended(), before, rtol=1e-4, atol=1e-3)


def test_folding_into_a_norm_that_adds_one(declare: Callable[..., ModelConfig]) -> None:
    config = declare(differing(DECODER, input_layernorm={"offset": 1.0}))
    site = layer_sites(config, 0, LINEARS)[0]
    assert site.source is not None and site.source.offset == 1.0
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(8, 128, generator=generator) for name in ATTENTION}
    weights["input_layernorm.weight"] = torch.randn(128, generator=generator) * 0.1

    def out() -> Tensor:
        return (1 + weights["input_layernorm.weight"]) * weights[f"{ATTENTION[1]}.weight"]

    before, folding = out(), Folding(weights, {"input_layernorm.weight": torch.bfloat16})
    scales = folding.possible(site, site.source, torch.rand(128, generator=generator) + 0.5)
    folding.fold(site, site.source, scales)
    norm = weights["input_layernorm.weight"]
    torch.testing.assert_close(norm.bfloat16().float(), norm, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out(), before, rtol=1e-5, atol=1e-6)


def test_a_router_is_scaled_with_the_experts_and_never_rounded(
    declare: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    def experts(config: ModelConfig) -> Extent:
        return Extent(8)

    norm = f"{LAYER}.post_attention_layernorm"
    router = Module(f"{LAYER}.mlp.router", "router", (experts,), hidden, reads=norm)
    config = declare((*DECODER, router))
    mlp = layer_sites(config, 0, ("mlp.up_proj", "mlp.router"))
    assert [site.linears for site in mlp] == [("mlp.up_proj", "mlp.router")]
    arrays = with_extra("mlp.router", 8)
    plan = make_plan(
        open_checkpoint(save_llama(tmp_path / "model", arrays)), QuantizeOptions(qformat="int4_wo")
    )
    assert len(plan.linears) == len(plan.schemes) == 2 * 7


def with_extra(name: str, rows: int) -> dict[str, Any]:
    extra = np.random.default_rng(1).normal(size=(rows, 128)).astype(np.float32)
    return llama_tensors() | {f"model.layers.{i}.{name}.weight": extra for i in range(2)}


def test_what_transformers_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    camelid = replace(LLAMA_ARCHITECTURE, name="camelid")
    monkeypatch.setattr(models, "load", lambda *_: camelid)
    with pytest.raises(CheckpointError, match="cannot run a model of type camelid"):
        Skeleton(replace(CONFIG, architecture="camelid"))


def test_a_rotation_that_transformers_does_not_do_is_said() -> None:
    half = ModelConfig.from_huggingface({**LLAMA, "partial_rotary_factor": 0.5})
    with pytest.raises(CheckpointError, match=r"\[16\] of 32 elements of a head are rotated"):
        Skeleton(half)
