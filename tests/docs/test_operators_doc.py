"""``docs/operators.md`` is what the specs say."""

from __future__ import annotations

from docs.generate_operators import PAGE, render

from slipstream.plugins.operators import OPERATORS
from slipstream.plugins.spec import AttributeSpec, OperatorSpec, TensorSpec


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(OPERATORS), (
        "docs/operators.md is stale; run: python docs/generate_operators.py"
    )


def test_everything_of_a_spec_is_shown() -> None:
    tensors = (
        TensorSpec("x", ("float32", "int8"), ("T", "2*W"), "a | b"),
        TensorSpec("bias", ("float32",), (), "any shape", optional=True),
    )
    attributes = (AttributeSpec("width", "int", "W"), AttributeSpec("eps", "float", "tiny", 0.5))
    spec = OperatorSpec("Op", "What it does.", tensors, tensors[:1], attributes, "a.b:c", 3)
    page = render({"Op": spec})
    for text in (
        "## Op\n\nWhat it does.\n\nVersion 3. Defined by `a.b:c`.",
        "| `x` | float32 / int8 | `[T, 2*W]` | a \\| b |",
        "| `bias` (optional) | float32 | see meaning | any shape |",
        "| `width` | int | required | W |",
        "| `eps` | float | 0.5 | tiny |",
    ):
        assert text in page
