"""Answers of CPU engines whose graph finds the best tokens, and of those from before it did: the
same, token for token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests.runtime.executors.test_cpu_speculation import answers

from slipstream import LLM, SamplingParams
from slipstream.builder.contract import LOGITS, SAMPLED, TARGET_GRAPH, TOP_LOGIT, TOP_TOKEN
from slipstream.builder.engine import MANIFEST, digest, open_engine
from slipstream.runtime.executors.cpu import CPUExecutor
from slipstream.runtime.loading import load

GRAPH = "graph.onnx"


@pytest.fixture(scope="module")
def older(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine as it was made when graphs gave logits only."""
    path = tmp_path_factory.mktemp("older") / "engine"
    shutil.copytree(tiny_engine, path)
    model = ir.load(path / GRAPH)
    (node,) = [node for node in model.graph if node.op_type == "TopToken"]
    del model.graph.outputs[1:]
    model.graph.remove(node, safe=True)
    ir.save(model, path / GRAPH)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["graphs"][TARGET_GRAPH]["outputs"][1:]
    del manifest["plugins"]["TopToken"]
    manifest["files"][GRAPH] = digest(path / GRAPH)
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def names(engine: Path) -> list[str]:
    return [output.name for output in open_engine(engine).manifest.graphs[TARGET_GRAPH].outputs]


@pytest.mark.parametrize("options", [{}, {"speculative": "ngram"}], ids=str)
def test_answers_are_those_of_engines_without(
    tiny_engine: Path, older: Path, options: dict[str, Any]
) -> None:
    assert names(tiny_engine) == [*SAMPLED] and names(older) == [LOGITS]
    new, old = answers(tiny_engine, **options), answers(older, **options)
    assert [[each.token_ids for each in found] for found in new] == [
        [each.token_ids for each in found] for found in old
    ]
    assert [[each.logprobs for each in found] for found in new] == [
        [each.logprobs for each in found] for found in old
    ]


def test_the_graph_decides_what_plain_rows_get(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their logits are not looked at, and those of others are."""
    engine = load(tiny_engine, {"num_threads": 1})
    executor = engine.executor
    assert isinstance(executor, CPUExecutor)
    params = [
        SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={3: 100.0}),
    ]
    seen = list[dict[str, Any]]()
    monkeypatch.setattr(executor._sampler, "result", _noting(executor._sampler.result, seen))
    with LLM.from_engine(engine) as llm:
        plain, biased = llm.generate([[5, 6, 7], [8, 9]], params)
    assert plain.outputs[0].token_ids == [7] * 4 and biased.outputs[0].token_ids == [3] * 4
    for each in seen:
        best = each[LOGITS].argmax(axis=1)
        assert each["best"] == best.tolist()
        rows = np.arange(len(best))
        np.testing.assert_array_equal(each[TOP_LOGIT], each[LOGITS][rows, best])


def _noting(result: Any, seen: list[dict[str, Any]]) -> Any:  # noqa: ANN401
    """Notes what a step gives, and has the graph say that token 7 is the best of all rows."""

    def noted(outputs: dict[str, Any], batch: Any) -> Any:  # noqa: ANN401
        copies = {name: array.copy() for name, array in outputs.items()}
        seen.append({**copies, "best": outputs[TOP_TOKEN].tolist()})
        outputs[TOP_TOKEN][:] = 7
        return result(outputs, batch)

    return noted
