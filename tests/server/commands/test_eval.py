from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tests.eagle3_heads import random_tensors, save_head, specforge

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.quantize import texts
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.cli import slipstream

TEXT = "the quick brown fox jumps over the lazy dog, and the cat sat on the mat. " * 12


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["eval", *map(str, arguments)])


def measured(*arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def int4_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = tmp_path_factory.mktemp("int4") / "engine"
    build(tiny_checkpoint, engine, BuildOptions(quantization="int4_wo"))
    return engine


def losses_of_transformers(checkpoint: Path, window: int) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.tensor(Tokenizer.from_directory(checkpoint).encode(TEXT))
    losses = []
    for start in range(0, len(tokens), window):
        part = tokens[start : start + window]
        with torch.inference_mode():
            logits = model(part[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
    return torch.cat(losses).double()


def test_perplexity_is_that_of_transformers(
    tiny_engine: Path, tiny_checkpoint: Path, text: Path
) -> None:
    found = measured(tiny_engine, "--text", text, "--window", 100)
    losses = losses_of_transformers(tiny_checkpoint, 100)
    assert (found["tokens"], found["window"]) == (len(losses), 100)
    assert found["nll"] == pytest.approx(losses.mean().item(), abs=1e-4)
    assert found["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    error = losses.std().item() / math.sqrt(len(losses))
    assert found["standard_error"] == pytest.approx(error * found["perplexity"], rel=1e-3)
    assert found["accuracy"] is None and found["reference"] is None


def test_small_steps_give_the_same(tiny_engine: Path, text: Path) -> None:
    whole, stepped = (
        measured(tiny_engine, "--text", text, "--window", 300, *more)
        for more in ((), ("--max-num-tokens", 64, "--num-threads", 1))
    )
    assert stepped["nll"] == pytest.approx(whole["nll"], abs=1e-5)


def test_an_engine_agrees_with_its_checkpoint(
    tiny_engine: Path, tiny_checkpoint: Path, text: Path
) -> None:
    found = measured(tiny_engine, "--text", text, "--reference", tiny_checkpoint)
    compared = found["accuracy"]
    assert compared["kl_mean"] < 1e-6
    assert compared["top1_agreement"] == 1
    assert abs(compared["perplexity_increase"]) < 1e-4
    assert compared["candidate"]["perplexity"] == found["perplexity"]


def test_an_engine_as_the_reference_needs_no_torch(
    int4_engine: Path, tiny_engine: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "slipstream.quantize.forward", raising=False)
    compared = measured(int4_engine, "--reference", tiny_engine, "--text", text)["accuracy"]
    assert compared["kl_mean"] > 1e-3 and compared["kl_p99"] > compared["kl_mean"]
    assert 0 < compared["top1_agreement"] < 1
    assert compared["perplexity_increase_standard_error"] > 0
    itself = measured(int4_engine, "--reference", int4_engine, "--text", text)["accuracy"]
    assert (itself["kl_mean"], itself["top1_agreement"]) == (0, 1)


def test_a_checkpoint_as_the_reference_does(
    tiny_engine: Path, tiny_checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "slipstream.quantize.forward", raising=False)
    result = run(tiny_engine, "--reference", tiny_checkpoint, "--text", text)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: a checkpoint as the reference needs torch")
    assert "pip install 'slipstream[quantize]'" in result.stderr


def test_the_shipped_text_and_text_for_people(tiny_engine: Path, int4_engine: Path) -> None:
    result = run(int4_engine, "--reference", tiny_engine)
    assert result.exit_code == 0, result.output
    for words in ("perplexity", "tokens predicted", "windows:", "of up to 512 tokens", "±"):
        assert words in result.stdout
    for words in ("change", "(paired)", "KL divergence", "99th percentile", "same top token"):
        assert words in result.stdout
    assert "the one that comes with Slipstream" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "missing.txt"), "missing.txt cannot be read"),
        (("--window", "5000"), "max_seq_len is 512"),
        (("--reference", "missing.gguf"), "missing.gguf does not exist"),
        (("--kv-cache-bytes", "1k"), "raise --kv-cache-bytes"),
    ],
)
def test_bad_use_is_one_line(tiny_engine: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(tiny_engine, *arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_model_is_no_reference(tiny_engine: Path, text: Path, tmp_path: Path) -> None:
    from tests.tiny_models import llama_tensors, save_llama

    other = save_llama(tmp_path / "other", llama_tensors(vocab_size=352), vocab_size=352)
    engine = tmp_path / "engine"
    build(other, engine, BuildOptions())
    result = run(tiny_engine, "--reference", engine, "--text", text)
    assert result.exit_code == 1
    assert "320 and 352 tokens" in result.stderr


@pytest.mark.real_model
def test_smollm2_stays_near_its_checkpoint(
    smollm2_engine: Path, smollm2_gguf: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(texts.load("evaluation")["evaluation_technical.txt"][:2400])
    found = measured(smollm2_engine, "--reference", smollm2_gguf, "--text", text)
    compared = found["accuracy"]
    assert found["tokens"] > 400 and 5 < found["perplexity"] < 40
    assert 1e-4 < compared["kl_mean"] < 3e-3
    assert compared["top1_agreement"] > 0.95
    assert abs(compared["perplexity_increase"]) < 0.02
    assert compared["perplexity_increase_standard_error"] < 0.01


def test_acceptance_of_a_head(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    config = specforge()
    head = save_head(tmp_path / "head", config, random_tensors(config))
    engine = tmp_path / "engine"
    build(tiny_checkpoint, engine, BuildOptions(speculative_model=str(head)))
    given = (engine, "--text", text, "--num-threads", 1, "--speculative", "eagle3")
    found = measured(*given, "--num-speculative-tokens", 2)
    prompts, shares = found["prompts"], found["acceptance_by_position"]
    assert prompts > 1 and found["window"] == 128
    assert len(shares) == 2 and 0 <= shares[1] <= shares[0] <= 1
    assert found["acceptance_length"] == pytest.approx(1 + sum(shares))
    assert found["num_draft_tokens"] <= 2 * found["num_drafts"] <= 2 * 64 * prompts
    # Where n-grams agree, the text repeats itself, and guesses are right.
    ngram = run(engine, "--text", text, "--num-threads", 1, "--speculative", "ngram")
    assert "accepted by position" in ngram.output and "drafts             " in ngram.output
    refused = run(*given, "--reference", engine)
    assert refused.exit_code == 2 and "--speculative has no reference" in refused.output
    shown = CliRunner().invoke(slipstream, ["inspect", "--verify", str(engine)])
    assert f"eagle3 of {head}, after layers 2, 3 and 1, 100 tokens" in shown.output
