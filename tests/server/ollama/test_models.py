"""Forms, thoughts, vectors and descriptions of tiny random models through Ollama's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ollama
import pytest
from pydantic import BaseModel
from tests.runtime.chat.templates import QWEN
from tests.server.openai.serving import Running, serving
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.runtime.llm import LLM
from slipstream.runtime.loading import load
from slipstream.server.core import vectors

Connect = Callable[[Running], ollama.Client]
HELLO: list[Any] = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    """What an answer is parsed as."""

    unit: Literal["celsius", "kelvin"]
    rains: bool


FORM = Weather.model_json_schema()
# A random model likes white space, and has room for it.
OPTIONS = {"num_predict": -1, "seed": 1}


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a random model with the chat template of Qwen 3."""
    template = tmp_path_factory.mktemp("template") / "qwen3.jinja"
    template.write_text(QWEN)
    engine = load(tiny_engine, {"chat_template": str(template)})
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embedding")
    checkpoint = save_llama(root / "checkpoint", llama_tensors())
    modules = [{"type": "a.Transformer"}, {"type": "a.Normalize"}]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    build(checkpoint, root / "engine", BuildOptions(target="cpu", task="embed"))
    return root / "engine"


def test_an_answer_holds_to_a_schema(tiny: Running, client: Connect) -> None:
    chat = client(tiny).chat("counting", HELLO, format=FORM, think=False, options=OPTIONS)
    assert Weather.model_validate_json(chat.message.content or "")
    assert chat.done_reason == "stop" and chat.message.thinking is None
    for raw in (True, False):
        asked = client(tiny).generate("counting", "hi", raw=raw, format=FORM,
                                      think=None if raw else False, options=OPTIONS)  # fmt: skip
        assert Weather.model_validate_json(asked.response or "")


def test_json_is_an_object(tiny: Running, client: Connect) -> None:
    lines = client(tiny).generate("counting", "hi", format="json", think=False, stream=True,
                                  options={"num_predict": 5})  # fmt: skip
    assert "".join(line.response or "" for line in lines).startswith("{")


def test_thinking_is_switched_in_the_template(tiny: Running, client: Connect) -> None:
    def prompt_of(*, think: bool) -> int:
        options = {"num_predict": 1}
        answer = client(tiny).chat("counting", HELLO, think=think, options=options)
        return answer.prompt_eval_count or 0

    # Qwen's writes empty thoughts in place of the model's.
    assert prompt_of(think=False) > prompt_of(think=True)


def test_a_model_is_shown(tiny: Running, client: Connect) -> None:
    shown = client(tiny).show("counting:latest")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.template == QWEN
    assert shown.details is not None and shown.details.family == "llama"
    assert shown.details.quantization_level == "none" and shown.details.parameter_size
    info = shown.modelinfo or {}
    assert info["general.architecture"] == "llama" and info["general.parameter_count"] > 0
    assert info["llama.context_length"] == tiny.llm.config.max_seq_len
    (listed,) = client(tiny).list().models
    assert listed.size and listed.digest == tiny.llm.fingerprint
    (running,) = client(tiny).ps().models
    assert running.size == listed.size and running.size_vram == 0


def test_texts_become_vectors(
    embedding: Path, monkeypatch: pytest.MonkeyPatch, client: Connect
) -> None:
    texts = ["the cat", "a dog sat"]
    with LLM(embedding) as llm:
        want = llm.embed(texts)
    with serving(load(embedding, {})) as running:
        answer = client(running).embed("counting", texts)
        np.testing.assert_array_equal(np.array(answer.embeddings, np.float32), want)
        assert answer.prompt_eval_count and answer.total_duration
        (short,) = client(running).embed("counting", texts[0], dimensions=4).embeddings
        assert len(short) == 4 and abs(np.linalg.norm(short) - 1) < 1e-5
        assert client(running).embed("counting", []).embeddings == []
        older = np.array(client(running).embeddings("counting", texts[0]).embedding)
        assert abs(np.linalg.norm(older) - 1) > 1e-2, "it is as the model leaves it"
        np.testing.assert_allclose(older / np.linalg.norm(older), want[0], rtol=1e-5, atol=1e-6)
        assert client(running).embeddings("counting", "").embedding == []
        assert client(running).show("counting").capabilities == ["embedding"]
        long = "the cat " * running.llm.config.max_seq_len
        assert len(client(running).embed("counting", long).embeddings) == 1
        with pytest.raises(ollama.ResponseError, match="tokens"):
            client(running).embed("counting", long, truncate=False)
        monkeypatch.setattr(vectors, "MAX_NUMBERS", 7)
        with pytest.raises(ollama.ResponseError, match="Lower dimensions"):
            client(running).embed("counting", texts, dimensions=4)
