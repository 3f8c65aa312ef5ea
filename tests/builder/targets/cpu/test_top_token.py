from __future__ import annotations

import dataclasses

from tests.programs import feeds, outputs, parse
from tests.programs import run_onnxruntime as run

from slipstream.builder.contract import LOGITS, STATES, TOP_LOGIT, TOP_TOKEN, GraphSpec, Output
from slipstream.builder.graph.program import Program
from slipstream.builder.graph.verifier import verify
from slipstream.builder.targets.cpu.elementwise import lower_soft_cap
from slipstream.builder.targets.cpu.top_token import add_top_tokens


def capped(output: str) -> Program:
    """A head whose rows are within a bound, on which many are equal."""
    program = parse(
        f"""g (float[T, 300] x) => (float[T, 300] {output}) {{
          {output} = slipstream.SoftCap <cap = 1.0> (x)
        }}"""
    )
    program.contract = GraphSpec("", (), (Output(output, "float32", ("T", 300)),))
    return program


def test_beside_logits_as_they_are_given() -> None:
    program = capped(LOGITS)
    inputs = feeds(program)
    inputs["x"] *= 30
    assert lower_soft_cap(program) == 1 and add_top_tokens(program) == 1
    assert program.contract is not None
    assert program.contract.outputs[1:] == (
        Output(TOP_TOKEN, "int32", ("T",)),
        Output(TOP_LOGIT, "float32", ("T",)),
    )
    program.contract = None  # that of a graph with none of a step's inputs
    verify(program, "the test")
    found = run(program, inputs)
    assert list(found) == [LOGITS, TOP_TOKEN, TOP_LOGIT]
    logits = found[LOGITS]
    assert (logits.argmax(axis=1) != inputs["x"].argmax(axis=1)).any(), "the bound makes ties"
    assert found[TOP_TOKEN].tolist() == logits.argmax(axis=1).tolist()
    assert found[TOP_LOGIT].tolist() == logits.max(axis=1).tolist()


def test_a_graph_without_logits_is_left_alone() -> None:
    program = capped(STATES)
    before = dataclasses.replace(program, contract=program.contract), list(outputs(program))
    assert add_top_tokens(program) == 0
    assert (program, list(outputs(program))) == before
