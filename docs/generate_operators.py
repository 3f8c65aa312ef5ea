"""Writes ``docs/operators.md`` from the operators' specs: ``python docs/generate_operators.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slipstream.plugins.operators import DOMAIN, OPERATORS, OURS
from slipstream.plugins.spec import INT_RANGE, AttributeSpec, OperatorSpec, TensorSpec

PAGE = Path(__file__).with_name("operators.md")

_HEAD = f"""# Operators

*Generated: run `python docs/generate_operators.py` when a spec under `plugins/` changes.*

The operators of the ONNX domain `{DOMAIN}`. [architecture.md](architecture.md) says where they
stand in the graph, [adding_an_operator.md](adding_an_operator.md) how one is made. A name that
stands in several shapes of one operator has one value in all of them.
"""


def render(operators: Mapping[str, OperatorSpec]) -> str:
    """The page in Markdown, operators in the order of the table."""
    return "\n".join([_HEAD, *(_operator(spec) for spec in operators.values())])


def _operator(spec: OperatorSpec) -> str:
    parts = [
        f"## {spec.name}\n\n{spec.doc}\n",
        f"Version {spec.version}. Defined by `{spec.reference}`.\n",
        _table(("input", "dtype", "shape", "meaning"), map(_tensor, spec.inputs)),
        _table(("output", "dtype", "shape", "meaning"), map(_tensor, spec.outputs)),
    ]
    if spec.attributes:
        rows = map(_attribute, spec.attributes)
        parts.append(_table(("attribute", "type", "default", "meaning"), rows))
    return "\n".join(parts)


def _tensor(tensor: TensorSpec) -> Sequence[str]:
    shape = f"`[{', '.join(tensor.shape)}]`" if tensor.shape else "see meaning"
    notes = ["optional"] * tensor.optional + ["written"] * tensor.written
    name = f"`{tensor.name}`" + (f" ({', '.join(notes)})" if notes else "")
    return name, " / ".join(tensor.dtypes), shape, tensor.doc


def _attribute(attribute: AttributeSpec) -> Sequence[str]:
    default = "required" if attribute.default is None else str(attribute.default)
    kind: str = attribute.type
    if kind == "int" and attribute.within != INT_RANGE:
        kind += ", {} to {}".format(*attribute.within)
    return f"`{attribute.name}`", kind, default, attribute.doc


def _table(head: Sequence[str], rows: map[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render({name: OPERATORS[name] for name in OURS}), encoding="utf-8")
