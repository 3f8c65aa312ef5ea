"""gpt-oss: messages on channels. What is on ``analysis`` is thought, a message to a function is a
call, all else is said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.calls import MOST_NAME, Calls, stream_value
from slipstream.runtime.chat.events import ContentText, OutputParser, ReasoningText
from slipstream.runtime.chat.family import callable_tools, check_choice, held
from slipstream.runtime.chat.grammar import Grammar, alternatives, quoted
from slipstream.runtime.chat.options import ChatOptions, Tool
from slipstream.runtime.chat.tape import Markers, StepParser, Steps, Tape
from slipstream.runtime.chat.template_needs import TemplateNeeds
from slipstream.runtime.structured.output import StructuredOutput

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_END, _CALL, _RETURN, _FORM = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
_ENDS = (_END, _CALL, _RETURN)
_MARKS = (_START, _CHANNEL, _MESSAGE, _FORM, *_ENDS)
_BODY_ENDS = Markers(*_ENDS, _START, _CHANNEL, exact=True)
_HEAD = re.compile(r"[^<]*")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)")
_MOST_HEAD = 1024


@dataclass(frozen=True, slots=True)
class Harmony:
    """The dialect of gpt-oss; ``tokens`` are the ids of its markers, ``skipped`` those of them
    that are left out of text."""

    needs: TemplateNeeds = field(default_factory=TemplateNeeds)
    tokens: Mapping[str, int] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()

    @property
    def special_tokens(self) -> Sequence[str]:
        """Special tokens that the parser must see in the text."""
        return [mark for mark in _MARKS if mark in self.skipped]

    @property
    def thinks(self) -> bool:
        """Whether the model may write thoughts."""
        return True

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template wants them: what is said beside a call is among the thoughts."""
        made = self.needs.messages(messages)
        return [_without_content(m) if m.get("tool_calls") else m for m in made]

    def tools(self, options: ChatOptions) -> list[dict[str, Any]] | None:
        """Tools as the template wants them, each argument described; None if there are none."""
        check_choice(options)
        if not options.tools or options.tool_choice == "none":
            return None
        tools = self.needs.tools(options.tools)
        for tool in tools:
            parameters = tool["function"]["parameters"]
            properties = parameters.get("properties")
            if isinstance(properties, Mapping):
                described = {name: _described(each) for name, each in properties.items()}
                parameters["properties"] = described
        return tools

    def variables(self, options: ChatOptions) -> dict[str, Any]:
        """What the template is given: it thinks always, at least a little."""
        known = self.needs.variables(options)
        effort = options.reasoning_effort
        if options.thinking is False or effort in ("none", "minimal"):
            known["reasoning_effort"] = "low"
        return known

    def structured(
        self, options: ChatOptions, wanted: StructuredOutput | None, prompt: str
    ) -> StructuredOutput | None:
        """Thoughts, then an answer on its channel or calls: as ``<|call|>`` ends a turn, one."""
        check_choice(options)
        tools = [held(tool) for tool in callable_tools(options)]
        must = options.must_call
        limited = 0 < len(tools) < len(options.tools)
        free = not limited and not any(tool.strict for tool in tools)
        if wanted is None and options.thinking_budget is None and not must and free:
            return None
        if not all(mark in self.tokens for mark in (_START, _CHANNEL, _MESSAGE, _END)):
            raise InvalidRequestError(
                "this model's tokenizer lacks the tokens of gpt-oss's format, so its output cannot "
                "be held to a form; use the tokenizer that the model came with"
            )
        grammar = Grammar(self.tokens)
        calls = [self._call(grammar, tool) for tool in tools]
        final = f"{grammar.literal(f'{_CHANNEL}final{_MESSAGE}')} " + (
            grammar.text() if wanted is None else grammar.wanted(wanted)
        )
        said = grammar.rule(
            f"{grammar.literal(f'{_CHANNEL}commentary{_MESSAGE}')} {self._text(grammar, None)}"
        )
        answer = grammar.rule(alternatives(calls if must else [*calls, final]))
        lead = f"({said})? " if calls and not must else ""
        return grammar.finish(f"{self._thoughts(grammar, options, prompt)} {lead}{answer}")

    def _text(self, grammar: Grammar, budget: int | None) -> str:
        """The body of a message that others follow."""
        return f"{grammar.until(_END, budget)} {grammar.literal(f'{_START}assistant')}"

    def _thoughts(self, grammar: Grammar, options: ChatOptions, prompt: str) -> str:
        head = grammar.literal(f"{_CHANNEL}analysis{_MESSAGE}")
        return grammar.rule(f"({head} {self._text(grammar, options.thinking_budget)})?")

    def _call(self, grammar: Grammar, tool: Tool) -> str:
        head = f"{grammar.literal(_CHANNEL)} {quoted(f'commentary to=functions.{tool.name} ')}"
        form = grammar.literal(f"{_FORM}json{_MESSAGE}")
        return grammar.rule(f"{head} {form} {grammar.schema(tool.parameters)}")

    def parser(self, options: ChatOptions, prompt: str) -> OutputParser:
        """A parser of one completion, whose first message's role ends ``prompt``."""
        tools = callable_tools(options)
        within = prompt.rstrip()
        if within.endswith(_MESSAGE):  # a client has begun the message
            head = within.rpartition(_CHANNEL)[2].removesuffix(_MESSAGE)
            return StepParser(lambda tape: _read(tape, Calls(tools), head))
        return StepParser(lambda tape: _read(tape, Calls(tools), None))


def _without_content(message: dict[str, Any]) -> dict[str, Any]:
    names = ("reasoning_content", "thinking", "reasoning")
    thoughts = next((message[name] for name in names if message.get(name)), None)
    content = message.get("content")
    if not isinstance(thoughts, str) or not isinstance(content, str) or not content:
        return message
    rest = {key: value for key, value in message.items() if key not in names}
    return {**rest, "content": "", "thinking": f"{thoughts}\n\n{content}"}


def _described(schema: Any) -> Any:  # noqa: ANN401 - JSON
    return {"description": "", **schema} if isinstance(schema, Mapping) else schema


def _read(tape: Tape, calls: Calls, head: str | None) -> Steps[None]:
    """Read messages to the end of the text."""
    while head is not None or (yield from tape.peek()):
        if head is None:
            tape.record()
            head = yield from _head(tape)
        if head is None:
            # A head that the text's end has cut off says nothing.
            if (yield from tape.peek()) or not tape.recorded().lstrip().startswith("<|"):
                yield ContentText(tape.recorded())
            yield from tape.until(_BODY_ENDS, ContentText)
            continue
        recipient = _RECIPIENT.search(head)
        if recipient is not None and recipient[1] in calls.tools:
            yield from _arguments(tape, calls, recipient[1])
        thought = "analysis" in head
        yield from tape.until(_BODY_ENDS, ReasoningText if thought else ContentText)
        head = None


def _head(tape: Tape) -> Steps[str | None]:
    """Read up to a message's body; None if none comes, with what was read on the record."""
    pieces: list[str] = []
    while sum(map(len, pieces)) < _MOST_HEAD:
        pieces.append((yield from tape.run(_HEAD, MOST_NAME)))
        mark = yield from tape.starts(*_MARKS)
        if mark == _MESSAGE:
            return " ".join(pieces)
        if mark is None and not pieces[-1]:
            break
        if mark is None and (yield from tape.peek()) in ("<", ""):
            break
    return None


def _arguments(tape: Tape, calls: Calls, name: str) -> Steps[None]:
    """Tell a call if its body is an object."""
    yield from tape.all_space()
    if (yield from tape.peek()) == "{":
        yield calls.begin(name)
        yield from stream_value(tape, calls)
        yield from tape.all_space()
