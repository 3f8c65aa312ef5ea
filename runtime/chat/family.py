"""A dialect put together: thoughts, a format of calls, and what its template wants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.calls import CallFormat, Calls, openai_id
from slipstream.runtime.chat.events import ContentText, OutputParser
from slipstream.runtime.chat.grammar import Grammar, alternatives
from slipstream.runtime.chat.options import AllowedTools, ChatOptions, NamedTool, Tool, ToolChoice
from slipstream.runtime.chat.tape import Markers, StepParser, Steps, Tape
from slipstream.runtime.chat.template_needs import TemplateNeeds
from slipstream.runtime.chat.thoughts import Thoughts
from slipstream.runtime.structured.output import StructuredOutput


@dataclass(frozen=True, slots=True)
class Family:
    """Thoughts, then text in which calls stand.

    ``tokens``: ids of texts that are one token; ``skipped``: those of them that are left out of
    text. Without ``calls`` all text is content, and tools are refused.
    """

    thoughts: Thoughts | None = None
    calls: CallFormat | None = None
    needs: TemplateNeeds = field(default_factory=TemplateNeeds)
    tokens: Mapping[str, int] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()

    @property
    def special_tokens(self) -> Sequence[str]:
        """Special tokens that the parser must see in the text."""
        marks = [] if self.calls is None else [*self.calls.marks]
        if self.thoughts is not None:
            marks += [self.thoughts.begin, self.thoughts.end, *(self.thoughts.answer or ())]
        return [mark for mark in marks if mark in self.skipped]

    @property
    def thinks(self) -> bool:
        """Whether the model may write thoughts."""
        return self.thoughts is not None

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template wants them."""
        return self.needs.messages(messages)

    def tools(self, options: ChatOptions) -> list[dict[str, Any]] | None:
        """Tools as the template wants them; None if there are none to call."""
        check_choice(options)
        if not options.tools or options.tool_choice == "none":
            return None
        if self.calls is None:
            raise InvalidRequestError(
                "this model's chat template knows no tools; leave tools out, or give another "
                "template with --chat-template FILE (chat_template in Python)",
                param="tools",
            )
        return self.needs.tools(options.tools)

    def variables(self, options: ChatOptions) -> dict[str, Any]:
        """What the template is given beside messages and tools."""
        return self.needs.variables(options)

    def structured(
        self, options: ChatOptions, wanted: StructuredOutput | None, prompt: str
    ) -> StructuredOutput | None:
        """The form of all that is generated after ``prompt``."""
        check_choice(options)
        grammar = Grammar(self.tokens)
        answer = self._answer(grammar, options, wanted)
        budget = options.thinking_budget
        thoughts = ""
        if self.thoughts is not None and (answer is not None or budget is not None):
            thoughts = self.thoughts.rule(grammar, prompt, budget)
        if thoughts:
            return grammar.finish(f"{thoughts} {answer or grammar.text()}")
        if answer is None or not callable_tools(options):
            return wanted
        return grammar.finish(answer)

    def _answer(
        self, grammar: Grammar, options: ChatOptions, wanted: StructuredOutput | None
    ) -> str | None:
        """The rule of what follows the thoughts; None if it is free."""
        tools = [held(tool) for tool in callable_tools(options)]
        form = None if wanted is None else grammar.wanted(wanted)
        if self.calls is None or not tools:
            return form
        many = options.parallel_tool_calls and not isinstance(options.tool_choice, NamedTool)
        if options.must_call:
            return self.calls.group(grammar, tools, many=many)
        if form is not None:
            return alternatives([self.calls.group(grammar, tools, many=many), form])
        limited = len(tools) < len(options.tools)
        if many and not limited and not any(tool.strict for tool in tools):
            return None
        return self.calls.free(grammar, tools, many=many)

    def parser(self, options: ChatOptions, prompt: str) -> OutputParser:
        """A parser of one completion after ``prompt``."""
        tools = callable_tools(options)
        return StepParser(lambda tape: self._read(tape, tools, prompt))

    def _read(self, tape: Tape, tools: Sequence[Tool], prompt: str) -> Steps[None]:
        ends: tuple[str, ...] = ()
        if self.thoughts is not None and not self.thoughts.closed(prompt):
            thought = yield from self.thoughts.read(tape, prompt)
            if thought and self.thoughts.answer is not None:
                begin, end = self.thoughts.answer
                yield from tape.starts(begin)
                yield from tape.all_space()
                ends = (end,)
        calls = self.calls if tools else None
        told = Calls(tools, openai_id if calls is None else calls.new_id)
        begins = () if calls is None else calls.begins
        if calls is not None:
            yield from calls.opening(tape, told)
        markers = Markers(*begins, *ends)
        while (found := (yield from tape.until(markers, ContentText))) is not None:
            if found.strip() not in ends:
                assert calls is not None
                tape.record(found)
                yield from calls.read(tape, told)


def check_choice(options: ChatOptions) -> None:
    """Raise ``InvalidRequestError`` for a choice that the tools do not allow."""
    choice = options.tool_choice
    names = [tool.name for tool in options.tools]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InvalidRequestError(f"two tools are named {twice!r:.80}; rename one", param="tools")
    unknown = next((name for name in _named(choice) if name not in names), None)
    if unknown is not None:
        raise InvalidRequestError(
            f"tool_choice names {unknown!r:.80}, which is none of the tools; they are "
            f"{', '.join(names[:20]) or 'none'}",
            param="tool_choice",
        )
    if isinstance(choice, AllowedTools) and not choice.names:
        raise InvalidRequestError(
            "tool_choice allows no tools; name some, or send 'none'", param="tool_choice"
        )
    if choice == "required" and not names:
        raise InvalidRequestError(
            "tool_choice is 'required', but there are no tools; give some", param="tool_choice"
        )


def _named(choice: ToolChoice) -> Sequence[str]:
    if isinstance(choice, AllowedTools):
        return choice.names
    return [choice.name] if isinstance(choice, NamedTool) else ()


def held(tool: Tool) -> Tool:
    """A tool with the schema that its arguments are held to: what no grammar can hold is refused
    only of one that is strict."""
    options = {"x-guidance": {"lenient": not tool.strict}}
    return replace(tool, parameters={"type": "object", **(tool.parameters or {}), **options})


def callable_tools(options: ChatOptions) -> Sequence[Tool]:
    """Those that may be called."""
    if named := _named(options.tool_choice):
        return [tool for tool in options.tools if tool.name in named]
    return () if options.tool_choice == "none" else options.tools
