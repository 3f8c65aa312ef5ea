"""Vectors and scores of tiny models equal those of transformers and sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tests.integration.test_architectures import GEMMA2, MULTIPLIERS, OLMOE
from tests.tiny_models import TINY_SHAPE, save_tiny
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.errors import ExecutionError, InvalidRequestError
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.engine.step import IntArray, StepBatch
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.runtime.llm import LLM
from slipstream.runtime.pooling import PoolingParams

Mode = Literal["last", "mean"]
Vectors = NDArray[np.float32]
QWEN3 = Qwen3Config(**TINY_SHAPE, head_dim=16, tie_word_embeddings=True)
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": QWEN3,
    "llama-untied": LlamaConfig(**TINY_SHAPE, tie_word_embeddings=False),
    # Logits are capped, and divided by a number, and states are neither.
    "gemma2": Gemma2Config(**GEMMA2, final_logit_softcapping=1.5),
    "granite": GraniteConfig(**TINY_SHAPE, **MULTIPLIERS),
    "olmoe": OlmoeConfig(**TINY_SHAPE, **OLMOE),
}
PROMPTS = [
    np.random.default_rng(n).integers(0, TINY_SHAPE["vocab_size"], n).tolist()
    for n in (1, 70, 5, 200, 33)
]
# Steps of few tokens cut prompts in pieces, beside the whole of others.
LIMITS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_num_tokens": 40, "max_batch_size": 3},
}
TEXTS = ["the quick brown fox", "jumps", "a lazy dog sat on the mat and the cat " * 5, "dog"]
SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
SOUGHT = "Given a web search query, retrieve relevant passages that answer the query"


def states(checkpoint: Path, prompts: Sequence[Sequence[int]]) -> list[Vectors]:
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([p])).last_hidden_state[0].numpy() for p in prompts]


def pooled(found: Sequence[Vectors], mode: Mode) -> Vectors:
    vectors = np.stack([each[-1] if mode == "last" else each.mean(axis=0) for each in found])
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


@pytest.mark.parametrize("mode", ["last", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_those_of_transformers(name: str, mode: Mode, tmp_path: Path) -> None:
    """Alone, in a batch, and in pieces beside the pieces of others."""
    checkpoint = save_tiny(CONFIGS[name], tmp_path / "checkpoint")
    want = pooled(states(checkpoint, PROMPTS), mode)
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cpu", task="embed", pooling=mode))
    for limits in LIMITS.values():
        with LLM(tmp_path / "engine", **limits) as llm:
            np.testing.assert_allclose(llm.embed(PROMPTS), want, atol=1e-4)
            np.testing.assert_allclose(llm.embed(PROMPTS[1]), want[1:2], atol=1e-4)


def test_a_prefix_is_shared_where_only_the_last_token_counts(tmp_path: Path) -> None:
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    prompts = [PROMPTS[3], [*PROMPTS[3][:150], *PROMPTS[1]]]
    found = states(checkpoint, prompts)
    modes: tuple[tuple[Mode, bool], ...] = (("last", True), ("mean", False))
    for mode, hits in modes:
        options = BuildOptions(target="cpu", task="embed", pooling=mode)
        build(checkpoint, tmp_path / "engine", options)
        with LLM(tmp_path / "engine") as llm:
            first, second = llm.embed(prompts[0]), llm.embed(prompts[1])
            assert (llm.stats.prefix_cache_hits > 0) == hits
        got = np.concatenate([first, second])
        np.testing.assert_allclose(got, pooled(found, mode), atol=1e-4)


def test_a_checkpoint_without_a_head_is_one_of_vectors(tmp_path: Path) -> None:
    """As sentence-transformers saves it: names without ``model.``, and a class without a head."""
    checkpoint = save_tiny(CONFIGS["llama-untied"], tmp_path / "whole")
    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((checkpoint / name).read_bytes())
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    manifest = build(tmp_path / "base", tmp_path / "engine", BuildOptions(target="cpu"))
    assert manifest.pooling is not None and manifest.pooling.mode == "last"
    with LLM(tmp_path / "engine") as llm:
        want = pooled(states(checkpoint, PROMPTS), "last")
        np.testing.assert_allclose(llm.embed(PROMPTS), want, atol=1e-4)


@pytest.mark.parametrize("quantization", ["int8_wo", "int4_wo"])
def test_what_quantization_costs(quantization: Any, tmp_path: Path) -> None:  # noqa: ANN401
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    options = BuildOptions(target="cpu", task="embed", quantization=quantization)
    build(checkpoint, tmp_path / "engine", options)
    with LLM(tmp_path / "engine") as llm:
        got = llm.embed(PROMPTS)
    alike = np.sum(got * pooled(states(checkpoint, PROMPTS), "last"), axis=1)
    assert alike.min() > {"int8_wo": 0.999, "int4_wo": 0.9}[quantization]


def test_scores_are_those_of_the_card_of_qwen3_reranker(tmp_path: Path) -> None:
    """Which encodes what stands around a pair apart from it."""
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    tokenizer = with_answers(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    answers = [tokenizer.token_to_id("no"), tokenizer.token_to_id("yes")]

    def score(query: str, document: str, sought: str = SOUGHT) -> float:
        pair = f"<Instruct>: {sought}\n<Query>: {query}\n<Document>: {document}"
        tokens = [token for part in (SYSTEM, pair, END) for token in tokenizer.encode(part).ids]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1, answers]
        return float(torch.softmax(logits, 0)[1])

    options = BuildOptions(target="cpu", task="score")
    manifest = build(checkpoint, tmp_path / "engine", options)
    assert manifest.graphs["target"].outputs[0].shape == ("L", 2)
    with LLM(tmp_path / "engine", max_num_tokens=100, max_batch_size=3) as llm:
        got = llm.score("where is the cat?", TEXTS)
        assert got == pytest.approx([score("where is the cat?", t) for t in TEXTS], abs=1e-4)
        (got_one,) = llm.score("dog", TEXTS[0], instruction="Find the fox")
        assert got_one == pytest.approx(score("dog", TEXTS[0], "Find the fox"), abs=1e-4)
        queries = ["fox", "cat", "dog", "the"]
        got = llm.score(queries, TEXTS)
        want = [score(*pair) for pair in zip(queries, TEXTS, strict=True)]
        assert got == pytest.approx(want, abs=1e-4)


def with_answers(checkpoint: Path) -> Tokenizer:
    """The tokenizer, after adding the tokens whose logits make a score."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    return tokenizer


def as_embedding_model(checkpoint: Path) -> None:
    """Give it the tokenizer of Qwen3-Embedding: no template, and a token at the end of a text."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 1)]
    )
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_vectors_are_those_of_sentence_transformers(mode: str, tmp_path: Path) -> None:
    """From the files that it writes, with their prompts; the last number of dimensions is cut."""
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    as_embedding_model(checkpoint)
    theirs = library.SentenceTransformer(
        modules=[
            modules.Transformer(str(checkpoint)),
            modules.Pooling(TINY_SHAPE["hidden_size"], mode),
            modules.Normalize(),
        ],
        prompts={"query": "the cat: ", "document": ""},
        device="cpu",
    )
    theirs.save(str(tmp_path / "saved"))
    build(tmp_path / "saved", tmp_path / "engine", BuildOptions(target="cpu"))
    with LLM(tmp_path / "engine", max_num_tokens=64) as llm:
        close: Callable[..., None] = np.testing.assert_allclose
        close(llm.embed(TEXTS), theirs.encode(TEXTS), atol=1e-4)
        queries = llm.embed(TEXTS, PoolingParams(prompt_name="query"))
        close(queries, theirs.encode(TEXTS, prompt_name="query"), atol=1e-4)
        cut = theirs.encode(TEXTS, truncate_dim=24, normalize_embeddings=True)
        close(llm.embed(TEXTS, PoolingParams(dimensions=24)), cut, atol=1e-4)
        alike = theirs.similarity(theirs.encode_query(TEXTS[0]), theirs.encode_document(TEXTS))
        close(llm.score(TEXTS[0], TEXTS), alike[0], atol=1e-4)


def test_scores_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.cross_encoder.modules")
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    tokenizer = with_answers(checkpoint)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}: "
        "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    )
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|im_end|>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    transformer = modules.Transformer(str(checkpoint), transformer_task="text-generation")
    yes, no = (tokenizer.token_to_id(answer) for answer in ("yes", "no"))
    theirs = library.CrossEncoder(
        modules=[transformer, modules.LogitScore(true_token_id=yes, false_token_id=no)],
        device="cpu",
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    build(tmp_path / "saved", tmp_path / "engine", BuildOptions(target="cpu"))
    with LLM(tmp_path / "engine") as llm:
        want = theirs.predict([("where?", text) for text in TEXTS])
        assert llm.score("where?", TEXTS) == pytest.approx(want.tolist(), abs=1e-4)


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, steps run kernel by kernel and without GEMVs, which take it seconds."""
    if not interpreting():
        return
    layers = StepRunner.layers

    def eager(self: StepRunner, batch: StepBatch, rows: IntArray) -> torch.Tensor:
        return layers(self, batch, rows, eager=True)

    monkeypatch.setattr(StepRunner, "capture", lambda *_: None)
    monkeypatch.setattr(StepRunner, "layers", eager)
    monkeypatch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about padding
@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("mode", ["last", "mean"])
def test_vectors_on_a_gpu(mode: Mode, tmp_path: Path) -> None:
    """A prompt in two pieces beside another."""
    config = Qwen3Config(
        **TINY_SHAPE | {"num_hidden_layers": 1}, head_dim=16, tie_word_embeddings=True
    )
    checkpoint = save_tiny(config, tmp_path / "checkpoint")
    options = BuildOptions(target="cuda", task="embed", pooling=mode, max_seq_len=64)
    build(checkpoint, tmp_path / "engine", options)
    prompts = [PROMPTS[4][:21], PROMPTS[2]]
    limits = {"max_num_tokens": 19, "max_batch_size": 2, "kv_cache_bytes": 1 << 20}
    with LLM(tmp_path / "engine", **limits) as llm:
        got = llm.embed(prompts)
    np.testing.assert_allclose(got, pooled(states(checkpoint, prompts), mode), atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["last", "mean"])
def test_captured_steps_give_the_same_vectors(mode: Mode, tmp_path: Path) -> None:
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    options = BuildOptions(target="cuda", task="embed", pooling=mode, dtype="float16")
    build(checkpoint, tmp_path / "engine", options)
    want = pooled(states(checkpoint, PROMPTS), mode)
    limits = {"max_num_tokens": 64, "max_batch_size": 4, "kv_cache_bytes": 8 << 20}
    with LLM(tmp_path / "engine", **limits) as llm:
        for _ in range(2):
            np.testing.assert_allclose(llm.embed(PROMPTS), want, atol=5e-3)


@pytest.mark.gpu
def test_scores_on_a_gpu(tmp_path: Path) -> None:
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    with_answers(checkpoint)
    build(checkpoint, tmp_path / "cpu", BuildOptions(target="cpu", task="score"))
    options = BuildOptions(target="cuda", task="score", dtype="float16")
    build(checkpoint, tmp_path / "cuda", options)
    with LLM(tmp_path / "cpu") as cpu, LLM(tmp_path / "cuda", kv_cache_bytes=8 << 20) as gpu:
        want = cpu.score("dog", TEXTS)
        assert gpu.score("dog", TEXTS) == pytest.approx(want, abs=0.01)


def test_a_state_that_is_no_number_ends_its_request_alone(tmp_path: Path) -> None:
    """A row whose state is not finite; the engine computes the next and stays well."""
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cpu", task="embed"))
    with LLM(tmp_path / "engine") as llm:
        loop = llm._loop
        submit = loop._engine.executor.submit

        def broken(batch: StepBatch) -> Any:  # noqa: ANN401
            started = submit(batch)

            def spoiled() -> Any:  # noqa: ANN401
                found = started.sample().result()
                for row, sampling in enumerate(batch.sampling):
                    if sampling.prompt[0] == 7:
                        found.outputs["states"][row, 0] = np.nan
                return found

            return _Spoiled(spoiled)

        loop._engine.executor.submit = broken  # type: ignore[method-assign]
        with pytest.raises(ExecutionError, match="not finite"):
            llm.embed([[7, 8]])
        assert np.isfinite(llm.embed([[9, 8]])).all()
        assert loop.unhealthy is None


class _Spoiled:
    def __init__(self, result: Callable[[], Any]) -> None:
        self.result = result

    def sample(self) -> _Spoiled:
        return self


def test_each_kind_of_engine_refuses_what_the_other_does(tmp_path: Path) -> None:
    checkpoint = save_tiny(QWEN3, tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "embed", BuildOptions(target="cpu", task="embed"))
    build(checkpoint, tmp_path / "generate", BuildOptions(target="cpu"))
    with LLM(tmp_path / "embed") as llm:
        with pytest.raises(InvalidRequestError, match="vectors of texts and has no logits"):
            llm.generate("a")
        with pytest.raises(InvalidRequestError, match="1 to 512"):
            llm.embed([[1] * 513])
        assert llm.embed([[1] * 512]).shape == (1, 64)
        with pytest.raises(InvalidRequestError, match="vectors have 64"):
            llm.embed("a", PoolingParams(dimensions=65))
        with pytest.raises(InvalidRequestError, match="instruction is for rerankers"):
            llm.score("a", "b", instruction="c")
    with LLM(tmp_path / "generate") as llm:
        with pytest.raises(InvalidRequestError, match="generates text and gives no hidden states"):
            llm.embed("a")
        with pytest.raises(InvalidRequestError, match="--task score"):
            llm.score("a", "b")


def test_an_engine_of_vectors_reads_no_head(tmp_path: Path) -> None:
    checkpoint = save_tiny(CONFIGS["llama-untied"], tmp_path / "checkpoint")
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" in tensors
    save_file({**tensors, "lm_head.weight": np.full((320, 64), np.nan, np.float32)}, file)
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cpu", task="embed"))
    with LLM(tmp_path / "engine") as llm:
        assert np.isfinite(llm.embed("a")).all()
