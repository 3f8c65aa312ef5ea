"""The GGUF file of SmolLM2-135M-Instruct, number by number and token by token."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.gguf.tokenizer import build_tokenizer

pytestmark = pytest.mark.real_model

TEXTS = [
    "Hello, world! It's a test; they'll've gone, and we'd better not say I'm late.",
    "def f(x: int) -> int:\n    return x ** 2\n\n\tfoo = [1, 22, 333]  # done\n",
    "Pi is 3.14159, 1234567890 is long, and in 2024 it was 7 °C.",
    "😀👩‍👩‍👧 naïve café Größe e\u0301 привет мир",
    "你好、世界。今天是2024年。こんにちは 안녕하세요",
    "   \n\n  \t x\r\n\r\n y      z   ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>a <|im_end|> b<file_sep><jupyter_start>c",
    "",
    " ",
    "\u0000\u0001\u200b\ufeff\ufffd\U0010ffff",
    "a" * 300,
]
# Digits after a run of spaces, where transformers' GGUF conversion is not the model's tokenizer.
DIGIT_TEXTS = ["x =  1", "a    7\n  22", "½ ² ٣ \uff11\uff12", "| 1 |   10 |"]


def test_tensors_are_exact(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    config = checkpoint.config
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    reader = gguf.GGUFReader(smollm2_gguf)
    kinds = {"F32": "dense", "Q4_1": "int", "Q8_0": "int"}

    assert len(checkpoint.names()) == len(reader.tensors) == 272
    # Both list the tensors in the order of the file; every seventh meets each module of a layer.
    for name, stored in list(zip(checkpoint.names(), reader.tensors, strict=True))[::7]:
        expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
        module = stored.name.split(".")[-2]
        if module in heads:
            halves = expected.reshape(heads[module], -1, 2, expected.shape[1])
            expected = halves.swapaxes(1, 2).reshape(expected.shape)
        tensor = checkpoint.tensor(name).load()
        assert tensor.format.kind == kinds[stored.tensor_type.name]
        np.testing.assert_array_equal(tensor.dequantize(), expected)


@pytest.fixture(name="tokenizers", scope="module")
def both_tokenizers(smollm2_gguf: Path) -> tuple[Tokenizer, Tokenizer]:
    """Ours and that of transformers."""
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    return build_tokenizer(open_checkpoint(smollm2_gguf).file.metadata), theirs.backend_tokenizer  # type: ignore[attr-defined]


def test_text_is_tokenized_as_by_transformers(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    ours, theirs = tokenizers

    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, skip_special_tokens=False
        )


def test_digits_are_split_as_by_the_model_itself(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    ours, theirs = tokenizers
    reference = Tokenizer.from_str(theirs.to_str())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )

    for text in TEXTS + DIGIT_TEXTS:
        assert ours.encode(text).ids == reference.encode(text).ids
