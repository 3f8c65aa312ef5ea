"""The tokenizer wrapper and chat templates, against transformers on tokenizers made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from slipstream.errors import CheckpointError, InvalidRequestError
from slipstream.runtime.text.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = "Hello, wörld! 日本語 👩‍👩‍👧 \n\t x=1;"

CHATML = """{%- if tools %}
{{ '<|im_start|>system\\n' -}}
    {%- for tool in tools %}
{{ tool | tojson }}
    {%- endfor %}
<|im_end|>
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<h>' + message['role'] + '</h>\\n\\n' + message['content'] | trim + '<e>' }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}{{- call.function | tojson(indent=2) }}{%- endfor %}
    {%- endif %}
{%- endfor %}
{{- ns.count ~ ' on ' ~ date_string }}
{%- if add_generation_prompt %}
    {{- '<h>assistant</h>\\n\\n' }}
{%- endif %}
{% generation %}marked{% endgeneration %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant!') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>&'\"</b> 日本"}],
    [
        {"role": "user", "content": " spaces \n"},
        {"role": "assistant", "content": "Yes", "tool_calls": None},
        {"role": "user", "content": ""},
    ],
]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "get", "arguments": {"ü": [1, 2.5, None, True]}}}],
    },
    {"role": "tool", "content": "sunny"},
]
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"z": 1, "a": "é<&>"}}}]


def byte_level_backend() -> tokenizers.Tokenizer:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["he"] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return backend


def write(path: Path, **files: str | dict[str, Any]) -> Path:
    """Write an engine directory's tokenizer files; keyword ``a_json`` becomes ``a.json``."""
    byte_level_backend().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        stem, suffix = name.rsplit("_", 1)
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return path


def reference(template: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(),
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
    )


def load(path: Path, template: str) -> Tokenizer:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    return Tokenizer.from_directory(
        write(path, tokenizer_config_json=config, chat_template_jinja=template)
    )


class TestEncoding:
    def test_round_trip_and_special_tokens(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer.from_directory(write(tmp_path))
        bos = tokenizer.token_to_id("<s>")
        with_bos = tokenizer.encode(TEXT)
        assert with_bos[0] == bos
        assert tokenizer.encode(TEXT, add_special_tokens=False) == with_bos[1:]
        assert tokenizer.decode(with_bos) == TEXT
        assert tokenizer.decode(with_bos, skip_special_tokens=False) == "<s>" + TEXT
        assert tokenizer.vocab_size == 257 + len(SPECIAL)
        assert tokenizer.id_to_token(bos or 0) == "<s>"
        assert tokenizer.id_to_token(10**6) is None
        assert tokenizer.special_token_ids == {tokenizer.token_to_id(token) for token in SPECIAL}

    def test_stored_truncation_and_padding_are_switched_off(self, tmp_path: Path) -> None:
        backend = byte_level_backend()
        backend.enable_truncation(4)
        backend.enable_padding(length=64)
        backend.save(str(tmp_path / "tokenizer.json"))
        assert len(Tokenizer.from_directory(tmp_path).encode("x" * 30)) == 31

    @pytest.mark.parametrize("prompt", ["lone \ud800 surrogate", 7, None, ["a"]])
    def test_what_is_no_text_is_refused(self, tmp_path: Path, prompt: object) -> None:
        with pytest.raises(InvalidRequestError, match="the prompt"):
            Tokenizer.from_directory(write(tmp_path)).encode(prompt)  # type: ignore[arg-type]


class TestFiles:
    def test_eos_of_both_files(self, tmp_path: Path) -> None:
        path = write(
            tmp_path,
            tokenizer_config_json={"eos_token": "</s>"},
            generation_config_json={"eos_token_id": [3, 4]},
        )
        tokenizer = Tokenizer.from_directory(path)
        assert tokenizer.eos_token_id == tokenizer.token_to_id("</s>")
        assert tokenizer.eos_token_ids == {3, 4, tokenizer.eos_token_id}
        assert tokenizer.bos_token_id is None

    def test_a_single_eos_id_and_the_special_tokens_map(self, tmp_path: Path) -> None:
        path = write(
            tmp_path,
            special_tokens_map_json={"bos_token": {"content": "<s>"}, "eos_token": "<s>"},
            tokenizer_config_json={"eos_token": "</s>"},
            generation_config_json={"eos_token_id": 0},
        )
        tokenizer = Tokenizer.from_directory(path)
        assert tokenizer.bos_token_id == tokenizer.token_to_id("<s>")
        assert tokenizer.eos_token_ids == {0, tokenizer.token_to_id("<s>")}

    def test_nothing_but_the_tokenizer(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer.from_directory(write(tmp_path))
        assert tokenizer.eos_token_ids == frozenset()
        assert not tokenizer.has_chat_template

    def test_missing_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*save_pretrained"):
            Tokenizer.from_directory(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", '{"model": 3}', "[]"])
    def test_damaged_tokenizer(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
            Tokenizer.from_directory(tmp_path)

    @pytest.mark.parametrize("content", ["{", "[1]"])
    def test_damaged_configuration(self, tmp_path: Path, content: str) -> None:
        path = write(tmp_path, tokenizer_config_json=content)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            Tokenizer.from_directory(path)

    def test_importing_needs_neither_jinja_nor_transformers(self) -> None:
        script = (
            "import sys, slipstream.runtime.text.tokenizer, slipstream.runtime.text.detokenizer;"
            "print(sorted({'jinja2', 'transformers', 'torch'} & set(sys.modules)))"
        )
        output = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        assert output.strip() == "[]"


class TestChatTemplates:
    @pytest.mark.parametrize(
        "template", [CHATML, LLAMA, MISTRAL], ids=["chatml", "llama", "mistral"]
    )
    @pytest.mark.parametrize("chat", CHATS, ids=["one", "several"])
    @pytest.mark.parametrize("add_generation_prompt", [True, False])
    def test_equal_transformers(
        self,
        tmp_path: Path,
        template: str,
        chat: list[dict[str, Any]],
        add_generation_prompt: bool,
    ) -> None:
        expected = reference(template).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        prompt = load(tmp_path, template).apply_chat_template(chat, add_generation_prompt)
        assert prompt == expected
        assert "Hi" in prompt or "Yes" in prompt

    @pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
    def test_tools_and_variables_equal_transformers(self, tmp_path: Path, template: str) -> None:
        arguments: dict[str, Any] = {"tools": TOOLS, "date_string": "1 Jan", "bos_token": "<B>"}
        expected = reference(template).apply_chat_template(
            TOOL_CHAT, tokenize=False, add_generation_prompt=True, **arguments
        )
        assert load(tmp_path, template).apply_chat_template(TOOL_CHAT, **arguments) == expected

    def test_tokens_equal_transformers(self, tmp_path: Path) -> None:
        tokenizer = load(tmp_path, CHATML)
        expected = reference(CHATML).apply_chat_template(
            CHATS[0], add_generation_prompt=True, return_dict=False
        )
        prompt = tokenizer.apply_chat_template(CHATS[0])
        assert tokenizer.encode(prompt, add_special_tokens=False) == expected

    def test_named_templates(self, tmp_path: Path) -> None:
        named = [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"},
        ]
        path = write(tmp_path, tokenizer_config_json={"chat_template": named})
        tokenizer = Tokenizer.from_directory(path)
        assert tokenizer.apply_chat_template(CHATS[0]) == "plain"
        assert tokenizer.apply_chat_template(CHATS[0], tools=TOOLS) == "tools"

    def test_the_jinja_file_wins(self, tmp_path: Path) -> None:
        path = write(
            tmp_path, tokenizer_config_json={"chat_template": "config"}, chat_template_jinja="file"
        )
        assert Tokenizer.from_directory(path).apply_chat_template(CHATS[0]) == "file"

    def test_a_template_in_the_configuration(self, tmp_path: Path) -> None:
        path = write(tmp_path, tokenizer_config_json={"chat_template": "{{ messages|length }}"})
        tokenizer = Tokenizer.from_directory(path)
        assert tokenizer.has_chat_template
        assert tokenizer.apply_chat_template(CHATS[1]) == "3"

    def test_null_counts_as_absent_as_in_transformers(self, tmp_path: Path) -> None:
        template = "{{ messages[0].keys() | list }}"
        chat: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tools": None}]
        expected = reference(template).apply_chat_template(chat, tokenize=False)
        assert load(tmp_path, template).apply_chat_template(chat) == expected == "['role']"

    def test_the_callers_messages_are_left_alone(self, tmp_path: Path) -> None:
        template = "{% set _ = messages[0].update({'content': 'changed'}) %}"
        chat = [{"role": "user", "content": "x"}]
        with pytest.raises(InvalidRequestError, match="refused"):
            load(tmp_path, template).apply_chat_template(chat)
        assert chat == [{"role": "user", "content": "x"}]


class TestChatErrors:
    def test_no_template(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="no default chat template"):
            Tokenizer.from_directory(write(tmp_path)).apply_chat_template(CHATS[0])

    def test_the_templates_own_objection(self, tmp_path: Path) -> None:
        chat = [{"role": "assistant", "content": "first"}]
        with pytest.raises(InvalidRequestError, match="Roles must alternate"):
            load(tmp_path, MISTRAL).apply_chat_template(chat)

    def test_broken_template(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="not valid Jinja"):
            load(tmp_path, "{% for %}").apply_chat_template(CHATS[0])

    @pytest.mark.parametrize(
        "template",
        [
            "{{ messages.__class__.__mro__ }}",
            "{{ ''.__class__.__base__.__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ raise_exception.__globals__.keys() }}",
        ],
    )
    def test_the_sandbox_holds(self, tmp_path: Path, template: str) -> None:
        with pytest.raises(InvalidRequestError):
            load(tmp_path, template).apply_chat_template(CHATS[0])

    @pytest.mark.parametrize(
        ("messages", "complaint"),
        [
            ([], "non-empty list"),
            ("hello", "non-empty list"),
            (None, "non-empty list"),
            (["hello"], r"messages\[0\] is 'hello'"),
            ([{"content": "x"}], r"messages\[0\]\['role'\] is None"),
            ([{"role": "user", "content": "x"}, {"role": 3}], r"messages\[1\]\['role'\] is 3"),
            ([{"role": "user", "content": 7}], r"\['content'\] is 7"),
            ([{"role": "user", "content": "x", "extra": object()}], "expressed as JSON"),
            ([{"role": "user", "content": ["part"]}], "refused these messages"),
            ([{"role": "user"}], "refused these messages"),
        ],
    )
    def test_malformed_messages(self, tmp_path: Path, messages: object, complaint: str) -> None:
        with pytest.raises(InvalidRequestError, match=complaint):
            load(tmp_path, CHATML).apply_chat_template(messages)  # type: ignore[arg-type]


@pytest.mark.real_model
def test_smollm2_equals_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    truth = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    truth.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert ids == truth(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == truth.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.eos_token_ids == {truth.eos_token_id}
    assert tokenizer.apply_chat_template(CHATS[1]) == truth.apply_chat_template(
        CHATS[1], tokenize=False, add_generation_prompt=True
    )
