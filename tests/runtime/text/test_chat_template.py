"""Messages that are gone on with, roles and thoughts, as transformers renders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.runtime.text.test_tokenizer import CHATML, LLAMA, load, reference

from slipstream.errors import CheckpointError, InvalidRequestError
from slipstream.runtime.text.chat_template import ChatTemplate
from slipstream.runtime.text.tokenizer import Tokenizer

PREFILLS = [
    "{", "I", "<", "|", "", "\n", "end", "im_end", "<|", "_", " ", "Sure, ", "Sure,\n\n", "  x  ",
    "assistant", "<|im_end|>", "user\nHi", "CONTINUE_FINAL_MESSAGE_TAG", "日本 ",
]  # fmt: skip
TRIMMED = CHATML.replace("message['content'] +", "message['content'] | trim +")
CHANGED = CHATML.replace("message['content'] +", "message['content'] | upper +")
REASONING = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{% endfor %}"


def outcome(render: Any) -> str:  # noqa: ANN401 - a call
    try:
        return str(render())
    except (ValueError, InvalidRequestError):
        return "refused"


@pytest.mark.parametrize("template", [CHATML, TRIMMED, LLAMA, CHANGED, "{{ messages[0].role }}"])
@pytest.mark.parametrize("content", PREFILLS)
def test_continue_final_message_is_what_transformers_renders(
    tmp_path: Path, template: str, content: str
) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    truth, ours = reference(template), load(tmp_path, template)

    def theirs() -> Any:  # noqa: ANN401
        return truth.apply_chat_template(chat, tokenize=False, continue_final_message=True)

    assert outcome(lambda: ours.apply_chat_template(chat, continue_final_message=True)) == outcome(
        theirs
    )


@pytest.mark.parametrize(
    "final",
    [
        [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}, {"type": "image"}],
        [{"type": "image"}],
        None,
    ],
)
def test_the_last_text_of_several_parts_is_gone_on_with(tmp_path: Path, final: Any) -> None:  # noqa: ANN401
    template = (
        "{% for m in messages %}[{% for c in m['content'] %}{{ c.text }},{% endfor %}]{% endfor %}"
    )
    chat: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    chat.append({"role": "assistant", "content": final})
    truth, ours = reference(template), load(tmp_path, template)

    def theirs() -> Any:  # noqa: ANN401
        return truth.apply_chat_template(chat, tokenize=False, continue_final_message=True)

    assert outcome(lambda: ours.apply_chat_template(chat, continue_final_message=True)) == outcome(
        theirs
    )


def test_a_message_is_not_gone_on_with_and_begun(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, CHATML)
    chat = [{"role": "assistant", "content": "x"}]
    with pytest.raises(InvalidRequestError, match="cannot both be true"):
        tokenizer.apply_chat_template(chat, True, continue_final_message=True)
    assert tokenizer.apply_chat_template(chat).endswith("<|im_start|>assistant\n")


def test_the_developer_is_the_system_where_a_template_knows_no_other() -> None:
    chat = [{"role": "developer", "content": "x"}]
    template = "{{ messages[0].role }}"
    assert ChatTemplate(template).render(chat, None, {}) == "system"
    assert ChatTemplate(template + "{# developer #}").render(chat, None, {}) == "developer"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_every_name(tmp_path: Path, name: str) -> None:
    chat = [{"role": "assistant", "content": "x", name: "hm"}, {"role": "user", "content": "y"}]
    expected = reference(REASONING).apply_chat_template(chat, tokenize=False)
    assert load(tmp_path, REASONING).apply_chat_template(chat) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a' * 10000000000 }}",
        "{% for i in range(99999) %}" + "a" * 10000 + "{% endfor %}",
    ],
)
def test_a_template_without_end_refuses_the_request(template: str) -> None:
    with pytest.raises(InvalidRequestError, match="the chat template"):
        ChatTemplate(template).render([{"role": "user", "content": "x"}], None, {})


class TestAnotherTemplate:
    def test_takes_the_place_of_the_models(self, tmp_path: Path) -> None:
        load(tmp_path, "{% broken")
        file = tmp_path / "mine.jinja"
        file.write_text("{{ messages[0].content }} größe", encoding="utf-8")
        tokenizer = Tokenizer.from_directory(tmp_path, chat_template=file)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "x größe"

    def test_is_told_to_be_broken_at_once(self, tmp_path: Path) -> None:
        load(tmp_path, CHATML)
        (tmp_path / "mine.jinja").write_text("{% broken")
        with pytest.raises(CheckpointError, match=r"not valid Jinja.*--chat-template FILE"):
            Tokenizer.from_directory(tmp_path, chat_template=tmp_path / "mine.jinja")

    def test_is_told_to_be_missing(self, tmp_path: Path) -> None:
        load(tmp_path, CHATML)
        with pytest.raises(CheckpointError, match=r"no\.jinja cannot be read"):
            Tokenizer.from_directory(tmp_path, chat_template=tmp_path / "no.jinja")

    def test_is_the_remedy_for_a_model_without_one(self, tmp_path: Path) -> None:
        tokenizer = load(tmp_path, CHATML)
        (tmp_path / "chat_template.jinja").unlink()
        tokenizer = Tokenizer.from_directory(tmp_path)
        with pytest.raises(InvalidRequestError, match="--chat-template FILE"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
