"""Vectors and scores over HTTP, with OpenAI's own client and in the shapes of vLLM and Cohere."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from tests.server.openai.serving import Running, serving
from tests.tiny_models import llama_tensors, save_llama
from tokenizers import Tokenizer

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.runtime.llm import LLM
from slipstream.runtime.loading import load
from slipstream.runtime.pooling import PoolingParams
from slipstream.server.core import limits
from slipstream.server.core import vectors as vectors_module

EMBEDDINGS, RERANK, SCORE = "/v1/embeddings", "/v1/rerank", "/v1/score"
WIDTH = 128
TEXTS = ["the cat", "a dog sat", "fox"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an engine for each task of one model."""
    root = tmp_path_factory.mktemp("engines")
    checkpoint = save_llama(root / "checkpoint", llama_tensors())
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "modules.json").write_text(
        json.dumps([{"type": "a.Transformer"}, {"type": "a.Normalize"}])
    )
    prompts = {"prompts": {"query": "the fox: "}}
    (checkpoint / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    build(checkpoint, root / "embed", BuildOptions(target="cpu", task="embed"))
    build(checkpoint, root / "score", BuildOptions(target="cpu", task="score"))
    return root


@pytest.fixture(scope="module")
def vectors(engines: Path) -> Iterator[Running]:
    with serving(load(engines / "embed", {}), max_queued_requests=100) as running:
        yield running


@pytest.fixture(scope="module")
def scores(engines: Path) -> Iterator[Running]:
    with serving(load(engines / "score", {})) as running:
        yield running


@pytest.fixture(scope="module")
def want(engines: Path) -> Any:  # noqa: ANN401 - vectors
    with LLM(engines / "embed") as llm:
        return llm.embed(TEXTS)


def test_openais_client_asks_for_base64_and_gets_numbers(vectors: Running, want: Any) -> None:  # noqa: ANN401
    client = vectors.client()
    asked = [
        client.embeddings.create(model="counting", input=TEXTS),
        client.embeddings.create(model="counting", input=TEXTS, encoding_format="float"),
    ]
    for answer in asked:
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        got = np.array([entry.embedding for entry in answer.data], np.float32)
        np.testing.assert_array_equal(got, want)
        assert answer.object == "list" and answer.model == "counting"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_base64_is_float32_in_little_endian(vectors: Running, want: Any) -> None:  # noqa: ANN401
    body = {"input": TEXTS[0], "encoding_format": "base64"}
    (entry,) = vectors.post(EMBEDDINGS, body).json()["data"]
    assert np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").tolist() == want[0].tolist()


def test_texts_and_tokens_one_and_several(vectors: Running, want: Any) -> None:  # noqa: ANN401
    tokens = [vectors.llm.tokenizer.encode(text) for text in TEXTS]
    for given, count in ((TEXTS[0], 1), (tokens[0], 1), (tokens, 3), (TEXTS, 3)):
        answer = vectors.post(EMBEDDINGS, {"input": given}).json()
        got = [entry["embedding"] for entry in answer["data"]]
        np.testing.assert_array_equal(np.array(got, np.float32), want[:count])


def test_dimensions_and_what_is_not_brought_to_length_one(vectors: Running, engines: Path) -> None:
    with LLM(engines / "embed") as llm:
        raw = llm.embed(TEXTS[0], PoolingParams(normalize=False))[0]
        query = llm.embed(TEXTS[0], PoolingParams(prompt_name="query"))[0]

    def vector(**fields: Any) -> Any:  # noqa: ANN401
        answer = vectors.post(EMBEDDINGS, {"input": TEXTS[0], "user": "me", **fields})
        return np.array(answer.json()["data"][0]["embedding"], np.float32)

    np.testing.assert_array_equal(vector(normalize=False), raw)
    np.testing.assert_array_equal(vector(normalize=False, dimensions=5), raw[:5])
    cut = raw[:5] / np.linalg.norm(raw[:5])
    np.testing.assert_allclose(vector(dimensions=5), cut, rtol=1e-5)
    np.testing.assert_array_equal(vector(prompt_name="query"), query)
    assert not np.array_equal(query, vector())


def test_a_text_that_is_too_long_can_be_cut(vectors: Running) -> None:
    long = "fox " * 1000
    refused = vectors.post(EMBEDDINGS, {"input": [long]})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    for cut, tokens in ((-1, 512), (7, 7)):
        answer = vectors.post(EMBEDDINGS, {"input": [long], "truncate_prompt_tokens": cut})
        assert answer.json()["usage"]["prompt_tokens"] == tokens


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ""}, "input", "0 tokens"),
        ({"input": None}, "input", ""),
        ({"input": [[1], []]}, "input", ""),
        ({"input": [1, 999]}, "input", "the vocabulary has 0 to 319"),
        ({"input": [-1]}, "input", ""),
        ({"input": ["x"] * 165}, "input", "one request takes 1 to 164"),
        ({"input": "\ud800"}, "input", "not valid Unicode"),
        ({"dimensions": 129}, "dimensions", "vectors have 128"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
        ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "this engine takes 512"),
        ({"prompt_name": "x"}, "prompt_name", "its prompts are query"),
        ({"priority": 1}, "priority", "--allow-priority"),
        ({"temperature": 1}, "temperature", "unknown field"),
    ],
    ids=str,
)
def test_bad_requests(vectors: Running, fields: dict[str, Any], param: str, message: str) -> None:
    content = json.dumps({"input": "a", **fields})
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(vectors.url + EMBEDDINGS, content=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_an_answer_holds_so_many_numbers(vectors: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.MAX_NUMBERS >= 2048 * 1536
    monkeypatch.setattr(vectors_module, "MAX_NUMBERS", 3 * WIDTH)
    assert vectors.post(EMBEDDINGS, {"input": TEXTS}).status_code == 200
    refused = vectors.post(EMBEDDINGS, {"input": [*TEXTS, "x"]})
    assert refused.status_code == 400 and "512 numbers" in refused.json()["error"]["message"]
    assert vectors.post(EMBEDDINGS, {"input": [*TEXTS, "x"], "dimensions": 96}).is_success


def test_each_server_says_what_it_does_not_do(vectors: Running, server: Running) -> None:
    client = vectors.client()
    with pytest.raises(openai.BadRequestError, match="makes vectors of texts and has no logits"):
        client.chat.completions.create(
            model="counting", messages=[{"role": "user", "content": "a"}]
        )
    with pytest.raises(openai.BadRequestError, match="--task generate"):
        client.completions.create(model="counting", prompt="a")
    with pytest.raises(openai.BadRequestError, match="generates text and gives no hidden states"):
        server.client().embeddings.create(model="counting", input="a")
    for path in (RERANK, SCORE):
        body = {"documents": ["b"], "query" if path == RERANK else "queries": "a"}
        assert "--task score" in server.post(path, body).json()["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a")


def test_documents_are_ranked_by_their_vectors(vectors: Running, engines: Path) -> None:
    with LLM(engines / "embed") as llm:
        alike = llm.score("cat", TEXTS)
        a = llm.embed("cat", PoolingParams(prompt_name="query"))[0]
        np.testing.assert_allclose(alike, llm.embed(TEXTS) @ a, rtol=1e-4)
    check_ranking(vectors, alike)


def test_documents_are_ranked_by_a_reranker(scores: Running, engines: Path) -> None:
    with LLM(engines / "score") as llm:
        found = llm.score("cat", TEXTS)
        told = llm.score("cat", TEXTS, instruction="be kind")
    check_ranking(scores, found)
    body = {"queries": "cat", "documents": TEXTS, "instruction": "be kind"}
    answer = scores.post(SCORE, body).json()
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(told, abs=1e-6)
    assert "no vectors" in scores.post(EMBEDDINGS, {"input": "a"}).json()["error"]["message"]


def check_ranking(server: Running, found: list[float]) -> None:
    """``found`` are the scores of ``TEXTS`` for the query "cat"."""
    order = sorted(range(3), key=lambda index: -found[index])
    documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    for path in (RERANK, "/rerank", "/v2/rerank"):
        answer = server.post(path, {"query": "cat", "documents": documents}).json()
        assert [result["index"] for result in answer["results"]] == order
        assert [r["document"] for r in answer["results"]] == [{"text": TEXTS[i]} for i in order]
        got = [result["relevance_score"] for result in answer["results"]]
        assert got == pytest.approx([found[i] for i in order], abs=1e-6)
        assert answer["usage"]["total_tokens"] > 0 and answer["model"] == "counting"
    body = {"query": "cat", "documents": TEXTS, "top_n": 1, "return_documents": False}
    (result,) = server.post(RERANK, body).json()["results"]
    assert result["index"] == order[0] and "document" not in result
    for names in (("text_1", "text_2"), ("queries", "documents")):
        answer = server.post("/score", dict(zip(names, ("cat", TEXTS), strict=True))).json()
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(found, abs=1e-6)
        assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    pairs = {"queries": ["cat"] * 3, "documents": TEXTS}
    answer = server.post(SCORE, pairs).json()
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (RERANK, {"query": "a", "documents": []}, "documents"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        (RERANK, {"query": "a", "documents": ["b" * 9999]}, "documents"),
        (RERANK, {"query": "a", "documents": ["b"] * 2000}, "documents"),
        (RERANK, {"documents": ["b"]}, "query"),
        (SCORE, {"queries": ["a", "b"], "documents": ["c"]}, "documents"),
        (SCORE, {"queries": "a"}, "documents"),
        (SCORE, {"text_1": "a"}, "text_2"),
        (SCORE, {"text_1": "a", "documents": "b"}, "text_1"),
        (SCORE, {}, "queries"),
    ],
    ids=str,
)
def test_bad_pairs(scores: Running, path: str, body: dict[str, Any], param: str) -> None:
    answer = scores.post(path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error


def test_documents_are_cut_to_what_is_asked(scores: Running) -> None:
    def tokens(**fields: Any) -> int:  # noqa: ANN401
        body = {"query": "a", "documents": ["fox " * 300], **fields}
        used: int = scores.post(RERANK, body).json()["usage"]["total_tokens"]
        return used

    fewest = tokens(max_tokens_per_doc=1)
    assert fewest + 5 < tokens(max_tokens_per_doc=11) <= fewest + 10
    assert tokens(truncate_prompt_tokens=-1) <= 512


def test_metrics_count_prompts_that_were_pooled(vectors: Running) -> None:
    before = vectors.samples()
    vectors.post(EMBEDDINGS, {"input": [[5, 6, 7], [8]]})
    after = vectors.samples()

    def grown(name: str) -> float:
        return after[f"slipstream:{name}"] - before[f"slipstream:{name}"]

    assert grown("prompt_tokens_total") == 4
    assert grown("generation_tokens_total") == 0
    assert grown("request_success_total stop") == 2
    assert grown("e2e_request_latency_seconds_count") == 2


def test_requests_at_once_give_each_its_own(vectors: Running, want: Any) -> None:  # noqa: ANN401
    async def ask() -> list[Any]:
        async with vectors.async_client() as client:
            asked = [client.embeddings.create(model="counting", input=t) for t in TEXTS * 8]
            return list(await asyncio.gather(*asked))

    answers = asyncio.run(ask())
    got = np.array([answer.data[0].embedding for answer in answers], np.float32)
    np.testing.assert_allclose(got, np.tile(want, (8, 1)), atol=1e-5)
