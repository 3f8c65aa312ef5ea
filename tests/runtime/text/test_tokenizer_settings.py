"""Special and added tokens come from every file that may name them, as transformers has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.runtime.text.test_tokenizer import byte_level_backend, write

from slipstream.errors import CheckpointError
from slipstream.runtime.text.tokenizer import Tokenizer

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
SIZE = byte_level_backend().get_vocab_size()
PLAIN = {
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
}
TOOL = {"content": "<|tool|>", **PLAIN, "special": True}
END = {"content": "<|end|>", **PLAIN, "special": True}
WORD = {"content": "hello", **PLAIN, "special": False, "lstrip": True}
TEXTS = [
    "a<|tool|>b<|end|>",
    "  hello <|end|> hello",
    "<s>x</s> <mask> <|im_end|>[PAD]",
    "<image> he <extra>",
    "",
]

# What the files say, by the name of the case.
FILES: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {
        "tokenizer_config_json": {
            **FAST,
            "eos_token": "<|end|>",
            "added_tokens_decoder": {str(SIZE + 1): END, str(SIZE): TOOL},
        }
    },
    "added_tokens_that_are_not_special": {
        "tokenizer_config_json": {**FAST, "added_tokens_decoder": {str(SIZE): WORD}}
    },
    "added_tokens_json": {
        "tokenizer_config_json": {**FAST, "eos_token": "<|end|>"},
        "added_tokens_json": {"<|end|>": SIZE + 1, "<|tool|>": SIZE},
    },
    "special_tokens_map": {
        "tokenizer_config_json": FAST,
        "special_tokens_map_json": {"bos_token": "<s>", "eos_token": {"content": "</s>", **PLAIN}},
    },
    "both_files_and_the_map_wins": {
        "tokenizer_config_json": {**FAST, "eos_token": "</s>"},
        "special_tokens_map_json": {"eos_token": "<|im_end|>", "pad_token": "[PAD]"},
    },
    "both_files_and_the_decoder_wins": {
        "tokenizer_config_json": {
            **FAST,
            "eos_token": "</s>",
            "added_tokens_decoder": {str(SIZE): TOOL},
        },
        "special_tokens_map_json": {"eos_token": "<|im_end|>"},
    },
    "tokens_without_a_role": {
        "tokenizer_config_json": {**FAST, "additional_special_tokens": ["<|tool|>", "<|im_end|>"]},
        "special_tokens_map_json": {"extra_special_tokens": [{"content": "<extra>", **PLAIN}]},
    },
    "tokens_of_its_own": {
        "tokenizer_config_json": {
            **FAST,
            "mask_token": "<mask>",
            "image_token": "<image>",
            "extra_special_tokens": {"tool_token": "<|tool|>"},
        }
    },
    "tokenizer_json_says_what_is_put_around": {
        "tokenizer_config_json": {
            **FAST,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": False,
            "add_eos_token": True,
        }
    },
}
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ tool_token }}|{{ mask_token }}"


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_special_tokens_come_from_every_file(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, chat_template_jinja=TEMPLATE, **files)
    truth = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)

    for text in TEXTS:
        ids = truth(text)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == truth.decode(ids, skip_special_tokens=skip)
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat) == truth.apply_chat_template(chat, tokenize=False)
    assert tokenizer.eos_token_id == truth.eos_token_id


def test_a_token_that_the_model_has_no_logits_for_is_left_out(tmp_path: Path) -> None:
    config = {**FAST, "eos_token": "<|end|>", "added_tokens_decoder": {"0": TOOL, "1": END}}
    write(tmp_path, tokenizer_config_json=config)

    tokenizer = Tokenizer.from_directory(tmp_path, vocab_size=SIZE + 1)

    assert tokenizer.encode("<|tool|>", add_special_tokens=False) == [SIZE]
    assert max(tokenizer.encode("<|end|>")) < SIZE
    assert tokenizer.eos_token_id is None
    assert tokenizer.vocab_size == SIZE + 1


@pytest.mark.parametrize("ids", [-1, [-1, 3], [3]])
def test_ends_that_are_no_token_are_ignored(tmp_path: Path, ids: object) -> None:
    write(tmp_path, generation_config_json={"eos_token_id": ids})
    assert Tokenizer.from_directory(tmp_path).eos_token_ids <= {3}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"added_tokens_decoder": {"x": TOOL}}, "an object of tokens by their ids"),
        ({"added_tokens_decoder": {"1": "<|tool|>"}}, r"added_tokens_decoder\.1 is '<|tool|>'"),
        ({"added_tokens_decoder": {"1": {"content": 7}}}, r"content is 7; expected text"),
        ({"added_tokens_decoder": {"1": {**TOOL, "lstrip": 1}}}, r"lstrip is 1; expected true"),
        ({"additional_special_tokens": "<|tool|>"}, "expected a list"),
        ({"additional_special_tokens": [3]}, "expected text"),
        ({"eos_token": 3}, "expected text"),
    ],
)
def test_malformed_tokens_are_refused(
    tmp_path: Path, config: dict[str, Any], complaint: str
) -> None:
    write(tmp_path, tokenizer_config_json=json.dumps(config))
    with pytest.raises(CheckpointError, match=complaint):
        Tokenizer.from_directory(tmp_path)
