"""Foreign Jinja: chat templates, in a sandbox set up as in ``transformers`` that limits their work.

A template may loop without end, by mistake or on purpose. Every turn of a loop, every call, filter
and output is a step; steps, processor time and the bytes of what is made are limited.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
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
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from slipstream.weights.json import Origin
from slipstream.weights.template_sizes import (
    MAX_ELEMENTS,
    MeasuringFormatter,
    TemplateLimitError,
    check_filter,
    check_joined,
    check_method,
    check_operator,
    refuse_if,
    weigh,
)

# Ten thousand messages take a tenth of these.
MAX_STEPS = 1_000_000
MAX_SECONDS = 1.0
MAX_BYTES = 1 << 26  # of texts and lists, in all
_WIDEST = 4  # bytes of a character
_MAX_FORM = 1000  # characters of what a time is written in
_BYTES = ("encode", "from_bytes", "to_bytes")
_COMPILE_ERRORS = (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(slots=True)
class _Budget:
    """What is left of the work that a template may do."""

    deadline: float
    steps: int = MAX_STEPS
    bytes: int = MAX_BYTES
    next_look: float = 0.0

    def spend(self, made: int) -> None:
        self.steps -= 1
        self.bytes -= made
        if self.steps < 0 or self.bytes < 0 or self._is_late():
            raise TemplateLimitError(
                f"it was stopped after {MAX_STEPS - self.steps} steps that made "
                f"{MAX_BYTES - self.bytes} bytes: it may do {MAX_STEPS} in "
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


def _spend(made: int = 0) -> None:
    budget = _BUDGET.get()
    if budget is not None:
        budget.spend(made)


def _charge(value: Any) -> Any:  # noqa: ANN401 - any value of a template
    """Count a step and what it made, in bytes."""
    if isinstance(value, str):
        _spend(len(value) * (1 if value.isascii() else _WIDEST))
    else:
        _spend(8 * weigh(value).elements)
    return value


def _finished(value: Any) -> Any:  # noqa: ANN401
    """What a template puts out, before it is written as text."""
    check_joined((value,))
    return _charge(value)


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

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """A part of a text or a list is a copy."""
        if isinstance(node.arg, nodes.Slice):
            self._visit_counted(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """``~`` is no operator that a sandbox sees."""
        self.write("environment.concatenate(context.eval_ctx, ")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")

    def _visit_counted(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.charge(")
        visit(node, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Counting
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    spend = staticmethod(_spend)
    charge = staticmethod(_charge)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ANN401
        """Bytes are of no use to a text, and theirs is a second set of all methods."""
        return attr not in _BYTES and super().is_safe_attribute(obj, attr, value)

    def concatenate(self, evaluation: nodes.EvalContext, *parts: Any) -> str:  # noqa: ANN401
        """The parts of ``~`` as one text."""
        check_joined(parts)
        joined: str = _charge((markup_join if evaluation.autoescape else str_join)(parts))
        return joined

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Compute what may be long."""
        check_operator(operator, left, right)
        made = super().call_binop(context, operator, left, right)
        if operator != "+" or isinstance(made, str):
            return _charge(made)
        # The left is counted already: lists may grow by an element a message.
        _charge(right)
        _spend(8 * len(made) if isinstance(made, list | tuple) else 0)
        return made

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call a function, a macro, or a method of a value."""
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            name = __obj.__name__
            args = tuple(_held(each) for each in args) if name == "join" else args
            check_method(text, name, args, kwargs)
        return _charge(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: ANN401
        """What stands for ``format`` and ``format_map`` of a text: they measure first."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        @functools.wraps(formatted)
        def measured(*args: Any, **kwargs: Any) -> str:  # noqa: ANN401
            one = args[0] if value.__name__ == "format_map" and args else None
            given = ((), one) if isinstance(one, dict) else (args, kwargs)
            MeasuringFormatter(self).vformat(value.__self__, *given)
            return formatted(*args, **kwargs)

        return measured


def _held(parts: Any) -> Any:  # noqa: ANN401
    """What is to be joined as a list, which can be measured before it is used."""
    return parts if hasattr(parts, "__len__") else list(itertools.islice(parts, MAX_ELEMENTS + 1))


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test whose runs and results are counted."""
    value_at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        first, (value, *rest) = args[:value_at], args[value_at:]
        value = _held(value) if name == "join" else value
        check_filter(name, value, tuple(rest), kwargs)
        return _charge(function(*first, value, *rest, **kwargs))

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
        finalize=_finished,
        extensions=[_GenerationBlocks, loopcontrols],
    )
    # Jinja's own tojson escapes HTML characters and sorts keys.
    environment.filters["tojson"] = _to_json
    tables: tuple[dict[str, Any], ...] = (environment.filters, environment.tests)
    for table in tables:
        table.update({name: _counted(name, function) for name, function in table.items()})
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
    # The C library knows widths, and makes room for what it does not know.
    refuse_if(len(form) > _MAX_FORM or re.search(r"%[^a-zA-Z%]*\d", form) is not None)
    return datetime.now().strftime(form)
