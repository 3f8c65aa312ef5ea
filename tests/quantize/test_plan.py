from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import LLAMA

from slipstream.builder.models.config import ModelConfig
from slipstream.errors import BuildError, CheckpointError
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import LayerPlan, Plan, make_plan
from slipstream.weights.tensor import Kind, KVScales, LazyTensor, QuantTensor, WeightFormat


@dataclass(frozen=True)
class Shapes:
    """A checkpoint of names and shapes, whose weights must not be read."""

    hidden: int = 576
    inner: int = 1536
    kind: Any = "dense"
    path: Path = Path("shapes")
    kv_scales: KVScales | None = None
    pooling: None = None
    config: ModelConfig = field(init=False)

    def __post_init__(self) -> None:
        changes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "head_dim": 64}
        object.__setattr__(self, "config", ModelConfig.from_huggingface({**LLAMA, **changes}))

    def names(self) -> tuple[str, ...]:
        layers = [
            f"model.layers.{layer}.{part}.weight"
            for layer in range(2)
            for part in (
                *("input_layernorm", "post_attention_layernorm"),
                *(f"self_attn.{x}_proj" for x in "qkvo"),
                *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            )
        ]
        outer = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        return (*outer, *layers)

    def tensor(self, name: str) -> LazyTensor:
        shape = self.config.weight_shape(name)
        assert shape is not None
        kind: Kind = self.kind if "down_proj" in name else "dense"
        form = WeightFormat(shape, kind, "bfloat16" if kind == "dense" else "float16", 4, 32)

        def load() -> QuantTensor:
            raise AssertionError(f"{name} was read")

        return LazyTensor(name, form, load)

    def write_tokenizer(self, directory: Path) -> None:
        raise AssertionError("the tokenizer was read")


def plan(checkpoint: Shapes | None = None, **options: Any) -> Plan:  # noqa: ANN401
    return make_plan(checkpoint or Shapes(), QuantizeOptions(**options))


def groups(planned: Plan) -> dict[str, int]:
    return {
        module.rpartition(".")[2]: scheme.group
        for module, scheme in planned.layers[1].linears.items()
    }


def test_all_linears_get_the_largest_group_that_divides_each() -> None:
    planned = plan()
    assert [layer.index for layer in planned.layers] == [0, 1]
    assert set(groups(planned).values()) == {64} and len(groups(planned)) == 7
    assert planned.notes == ()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": ["re:.*(q|k|v|o|gate|up)_proj"]}, 128),  # 1,536 columns are left
        ({"overrides": ["re:.*(q|k|v|o|gate|up)_proj=fp8"]}, 128),  # others have no groups
        ({"overrides": ["re:.*(q|k|v|o|gate|up)_proj=int8_wo"]}, 64),
        ({"qformat": "fp8_block"}, 64),  # 576 and 192 rows count too
        ({"checkpoint": Shapes(inner=1000)}, 64),  # what stays dense does not
        ({"checkpoint": Shapes(hidden=512, inner=1056)}, 32),
    ],
)
def test_only_what_is_grouped_counts(options: Any, expected: int) -> None:  # noqa: ANN401
    grouped = {
        s.group for s in plan(**options).schemes.values() if s.grouping in ("group", "block")
    }
    assert grouped == {expected}


def test_a_group_size_that_does_not_divide_becomes_the_next_smaller_one_and_is_named() -> None:
    planned = plan(group_size=128)
    note = "model.layers.*.mlp.up_proj has groups of 64: 128 does not divide its 576 columns"
    assert f"{note} (2 layers)" in planned.notes


@pytest.mark.parametrize(
    ("given", "expected"), [(32, 32), (64, 64), (128, 128), (-1, 1536), (None, 64)]
)
def test_a_group_size_that_divides_is_kept(given: int | None, expected: int) -> None:
    assert groups(plan(group_size=given))["down_proj"] == expected


def test_a_row_that_no_group_divides_stays_dense_and_is_named() -> None:
    planned = plan(Shapes(inner=1000))
    assert "down_proj" not in groups(planned)
    assert any("down_proj stays dense" in note and "1000" in note for note in planned.notes)
    assert "up_proj" in groups(planned)
    blocks = plan(Shapes(inner=1000), qformat="fp8_block")
    assert set(groups(blocks)) == {f"{x}_proj" for x in "qkvo"}
    note = "model.layers.*.mlp.up_proj stays dense: no block of 64 or 32 divides its 1000 x 576"
    assert f"{note} (2 layers)" in blocks.notes


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(BuildError, match="none would be quantized: all are excluded"):
        plan(exclude=["re:.*"])
    with pytest.raises(BuildError, match=r"none would be quantized: model\.layers\..*stays dense"):
        plan(
            exclude=["re:.*self_attn.*", "re:.*down_proj"],
            qformat="nvfp4",
            checkpoint=Shapes(hidden=584),
        )


@pytest.mark.parametrize(
    ("qformat", "group", "rows", "activation"),
    [("int8_sq", 576, 1, "token"), ("fp8", 576, 1, "token"), ("fp8_static", 576, 1, "static"),
     ("fp8_block", 64, 64, "group"), ("nvfp4", 16, 1, "none"), ("w4a8_awq", 64, 1, "none")],
)  # fmt: skip
def test_formats_of_schemes(qformat: str, group: int, rows: int, activation: str) -> None:
    planned = plan(qformat=qformat, group_size=None)
    module = "model.layers.0.mlp.up_proj"
    form = planned.schemes[module].weight_format(planned.shape(module))
    assert (form.group, form.rows, form.activation) == (group, rows, activation)
    assert form.shape == (1536, 576)


def test_overrides_and_excludes() -> None:
    planned = plan(
        qformat="int4_gptq",
        overrides=[
            "re:.*down_proj=int8_wo",
            "model.layers.1.mlp.down_proj=fp8",
            "re:.*o_proj=dense",
        ],
        exclude=["model.layers.0.self_attn.q_proj"],
    )
    names = {module: scheme.name for module, scheme in planned.schemes.items()}
    assert names["model.layers.0.mlp.down_proj"] == "int8_wo"
    assert names["model.layers.1.mlp.down_proj"] == "fp8"
    assert names["model.layers.1.self_attn.q_proj"] == "int4_gptq"
    assert "model.layers.0.self_attn.q_proj" not in names
    assert not any("o_proj" in module for module in names)
    assert len(planned.linears) == 14 and planned.algorithms == {"gptq", "rtn"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["mlp"]}, "'mlp' matches none of the 14 linears.*a pattern starts with re:"),
        ({"overrides": ["re:.*experts.*=int8_wo"]}, "'re:.*experts.*' matches none"),
        ({"exclude": ["lm_head"]}, "'lm_head' matches none"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(options: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(BuildError, match=message):
        plan(**options)


def test_a_quantized_checkpoint_is_refused() -> None:
    message = (
        r"quantized already \(2 tensors, model\.layers\.0\.mlp\.down_proj\.weight in 4-bit int\)"
    )
    with pytest.raises(CheckpointError, match=message):
        plan(Shapes(kind="int"))


def test_sizes_add_up() -> None:
    planned = plan(qformat="int4_wo", group_size=64, exclude=["re:.*o_proj"])
    weights = {m: n * k for m in planned.linears for n, k in [planned.shape(m)]}
    quantized = sum(size for m, size in weights.items() if "o_proj" not in m)
    rest = planned.parameters - quantized
    assert planned.nbytes == quantized // 2 + quantized // 64 * 2 + rest * 2
    assert planned.source_nbytes == planned.parameters * 2
    dense = sum(weights.values()) - quantized
    bits = (quantized * (4 + 16 / 64) + dense * 16) / (quantized + dense)
    assert planned.effective_bits == pytest.approx(bits)


def test_other_qformats_for_some_linears() -> None:
    planned = plan(qformat="int4_awq")
    changed = planned.with_qformats(
        {"model.layers.1.mlp.down_proj": "int8_wo", "model.layers.0.mlp.up_proj": "dense"}
    )
    assert changed.schemes["model.layers.1.mlp.down_proj"].bits == 8
    assert "model.layers.0.mlp.up_proj" not in changed.schemes
    assert changed.effective_bits > planned.effective_bits
    assert len(planned.schemes) == 14
    assert isinstance(changed.layers[0], LayerPlan)


def test_text_is_needed_for_what_looks_at_activations() -> None:
    assert plan(qformat="int4_awq").calibrated and not plan(qformat="int4_wo").calibrated
    assert plan(qformat="int8_wo", kv_cache_dtype="fp8").calibrated
    assert not plan(qformat="fp8", kv_cache_dtype="int8").calibrated
    assert plan(qformat="fp8", overrides=["re:.*o_proj=int4_gptq"]).calibrated


def test_estimates_grow_with_the_work() -> None:
    small, large = plan(calib_size=8), plan(calib_size=64)
    assert small.memory < large.memory
    assert small.seconds(2) < large.seconds(2) < large.seconds(1)
    assert plan(qformat="int4_wo").memory < small.memory
    options = replace(QuantizeOptions(), qformat="int4_gptq")
    assert make_plan(Shapes(), options).seconds(2) > plan(qformat="int4_wo").seconds(2)
