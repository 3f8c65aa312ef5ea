"""Foreign Jinja: chat templates, in a sandbox set up as in ``transformers`` that limits their work.

A template may loop without end, by mistake or on purpose. Every turn of a loop, every call, filter
and output is a step; steps, processor time and the characters made are limited.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from time import monotonic, thread_time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from slipstream.weights.json import Origin

# Ten thousand messages take a tenth of these.
MAX_STEPS = 1_000_000
MAX_SECONDS = 1.0
MAX_CHARACTERS = 1 << 26
_MAX_ARGUMENT = 100_000  # of a width, an indent and the like; so many elements may a range have
_MAX_BITS = 4096
_MAX_ELEMENTS = 1 << 18  # of the lists in a value: more than a request may hold
_COMPILE_ERRORS = (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError)


class TemplateLimitError(jinja2.TemplateError):
    """A template did more than any needs to."""


@dataclass(slots=True)
class _Budget:
    """What is left of the work that a template may do."""

    deadline: float
    steps: int = MAX_STEPS
    characters: int = MAX_CHARACTERS
    next_look: float = 0.0

    def spend(self, characters: int) -> None:
        self.steps -= 1
        self.characters -= characters
        if self.steps < 0 or self.characters < 0 or self._is_late():
            raise TemplateLimitError(
                f"it was stopped after {MAX_STEPS - self.steps} steps that made "
                f"{MAX_CHARACTERS - self.characters} characters: it may do {MAX_STEPS} in "
                f"{MAX_SECONDS:g} s"
            )

    def _is_late(self) -> bool:
        # A thread's own time is dearer to ask for than a template's step.
        now = monotonic()
        if now < self.next_look:
            return False
        self.next_look = now + 0.01
        return thread_time() > self.deadline


_BUDGET: ContextVar[_Budget | None] = ContextVar("template_budget", default=None)


@contextmanager
def limited_work() -> Iterator[None]:
    """A budget for what templates do within; ``TemplateLimitError`` when it is spent."""
    # Of this thread's processor time, so that a busy machine stops no template that does little.
    token = _BUDGET.set(_Budget(thread_time() + MAX_SECONDS))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def compile_template(source: str, origin: Origin) -> jinja2.Template:
    """A template, to be rendered in ``limited_work``; ``origin`` refuses one that is broken."""
    try:
        with limited_work():  # constants are computed already
            return _environment().from_string(source)
    except _COMPILE_ERRORS as error:
        raise origin.refusal(f"is not valid Jinja ({str(error) or 'too deep'})") from error


def _spend(characters: int = 0) -> None:
    budget = _BUDGET.get()
    if budget is not None:
        budget.spend(characters)


def _charge(value: Any) -> Any:  # noqa: ANN401 - any value of a template
    """Count a step and what it made, in bytes as a list has them."""
    _spend(len(value) if isinstance(value, str) else 8 * _elements(value))
    return value


def _elements(value: Any) -> int:  # noqa: ANN401
    """How many elements the lists in a value have, each as often as it is there: a list of a list
    twice, and so on, is small until it is written. What would be too long then is refused."""
    count, characters, inside = 0, 0, [value]
    while inside:
        each = inside.pop()
        if isinstance(each, str):
            characters += len(each)
        elif isinstance(each, list | tuple | dict):
            count += len(each)
            inside += [*each, *each.values()] if isinstance(each, dict) else each
        _refuse_if(count > _MAX_ELEMENTS or characters > MAX_CHARACTERS)
    return count


def _refuse_if(too_much: bool) -> None:
    if too_much:
        raise TemplateLimitError("it asks for more characters or digits than any prompt has")


class _Counting(CodeGenerator):
    """Writes code that counts turns of loops, runs of macros and texts that are joined."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        """Every body begins by counting itself, with the text that it has."""
        for outer in node.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(outer, nodes.For | nodes.Macro | nodes.CallBlock)
            text = sum(len(data.data) for data in outer.find_all(nodes.TemplateData))
            outer.body.insert(0, nodes.ExprStmt(nodes.Const(text), lineno=outer.lineno))
        super().visit_Template(node, frame)

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        """Templates have no such statements but those that count."""
        assert isinstance(node.node, nodes.Const)
        self.writeline(f"environment.spend({node.node.value})", node)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """What is written as a list is counted with what it holds."""
        self._visit_counted(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """The same, unless names are assigned by it."""
        if node.ctx == "load":
            self._visit_counted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """The same."""
        self._visit_counted(super().visit_Dict, node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """``~`` is no operator that a sandbox sees."""
        self._visit_counted(super().visit_Concat, node, frame)

    def _visit_counted(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.charge(")
        visit(node, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Counting
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    spend = staticmethod(_spend)
    charge = staticmethod(_charge)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Compute what may be long."""
        if operator == "*":
            _refuse_if(_is_long_product(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_if(left.bit_length() * right > _MAX_BITS)
        made = super().call_binop(context, operator, left, right)
        if operator != "+" or isinstance(made, str):
            return _charge(made)
        # The left is counted already: lists may grow by an element a message.
        _charge(right)
        _spend(8 * len(made) if isinstance(made, list | tuple) else 0)
        return made

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call a function, a macro, or a method of a value."""
        if isinstance(getattr(__obj, "__self__", None), str):
            _check_numbers(args)
        return _charge(super().call(__context, __obj, *args, **kwargs))


def _is_long_product(left: Any, right: Any) -> bool:  # noqa: ANN401
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times > MAX_CHARACTERS
    whole = isinstance(left, int) and isinstance(right, int)
    return whole and left.bit_length() + right.bit_length() > _MAX_BITS


def _check_numbers(arguments: tuple[Any, ...]) -> None:
    _refuse_if(any(isinstance(each, int) and each > _MAX_ARGUMENT for each in arguments))


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test whose runs and results are counted."""
    value_at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        _check_numbers((*args[value_at + 1 :], *kwargs.values()))
        return _charge(function(*args, **kwargs))

    return counted


class _Namespace(Namespace):
    """Shows nothing of what it holds, which may be set after it was counted."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationBlocks(Extension):
    """``{% generation %}`` blocks mark assistant text for training; here they are just text."""

    tags = {"generation"}  # noqa: RUF012 - as declared by Extension

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_charge,
        extensions=[_GenerationBlocks, loopcontrols],
    )
    # Jinja's own tojson escapes HTML characters and sorts keys.
    environment.filters["tojson"] = _to_json
    tables: tuple[dict[str, Any], ...] = (environment.filters, environment.tests)
    for table in tables:
        table.update({name: _counted(function) for name, function in table.items()})
    environment.globals["namespace"] = _Namespace
    del environment.globals["lipsum"]  # makes any amount of text
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
