"""A template that does too much is stopped by its budget, whatever it does; others are not."""

from __future__ import annotations

import itertools
from functools import partial

import jinja2
import pytest

from slipstream.errors import CheckpointError
from slipstream.weights import templates
from slipstream.weights.json import Origin
from slipstream.weights.template_sizes import TemplateLimitError
from slipstream.weights.templates import compile_template, limited_work

ORIGIN = Origin("the template", "mend it")
GROWING = (
    "{{% set ns = namespace(x={0}) %}}{{% for i in range(64) %}}{1}{{% endfor %}}{{{{ ns.x }}}}"
)
TOO_MUCH = {
    "nested_loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "loops_that_skip": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "recursive_loops": (
        "{% for i in range(9) recursive %}{% if loop.depth < 99 %}{{ loop(range(9)) }}{% endif %}"
        "{% endfor %}"
    ),
    "macros": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "filters_in_loops": (
        "{% for i in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}"
    ),
    "tests_of_long_lists": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
    "text_joined": GROWING.format("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    "text_added": GROWING.format("'a'", "{% set ns.x = ns.x + ns.x %}"),
    "text_captured": GROWING.format("'a'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "lists_added": GROWING.format("[0]", "{% set ns.x = ns.x + ns.x %}"),
    "lists_nested": GROWING.format("[0]", "{% set ns.x = [ns.x, ns.x] %}"),
    "tuples_nested": GROWING.format("[0]", "{% set ns.x = (ns.x, ns.x) %}"),
    "fields_nested": GROWING.format("[0]", "{% set ns.x = {1: ns.x, 2: ns.x} %}"),
    "calls_nested": GROWING.format("[0]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "batches_nested": GROWING.format("[0]", "{% set ns.x = [1] | batch(99, ns.x) | list %}"),
    "nested_and_repeated": "{{ [[0] * 99999] * 99999 }}",
    "long_text_in_lists": "{{ ['a' * 60000000] * 99999 }}",
    "numbers": GROWING.format("3", "{% set ns.x = ns.x * ns.x %}"),
    "powers": "{{ 10 ** (10 ** 9) }}",
    "text_repeated": "{{ 'a' * 10000000000 }}",
    "lists_repeated": "{{ [0] * 10000000000 }}",
    "filters_that_pad": "{{ 'a' | center(10000000000) }}",
    "methods_that_pad": "{{ 'a'.ljust(10000000000) }}",
    "output": "{% for i in range(99999) %}" + "a" * 10000 + "{% endfor %}",
}


@pytest.fixture(name="clock")
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a hundredth of the time that there is."""
    ticks = itertools.count(step=templates.MAX_SECONDS / 100)
    monkeypatch.setattr(templates, "thread_time", lambda: next(ticks))
    monkeypatch.setattr(templates, "monotonic", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("source", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_does_too_much_is_stopped(source: str) -> None:
    template = compile_template(source, ORIGIN)
    with limited_work(), pytest.raises(TemplateLimitError):
        template.render()


@pytest.mark.parametrize("kind", ["nested_loops", "macros"])
def test_steps_are_limited_however_quick(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(templates._Budget, steps=1000)
    monkeypatch.setattr(templates, "_Budget", few)
    monkeypatch.setattr(templates, "thread_time", lambda: 0.0)
    template = compile_template(TOO_MUCH[kind], ORIGIN)
    with limited_work(), pytest.raises(TemplateLimitError, match="stopped after"):
        template.render()


def test_ordinary_work_is_within_the_budget() -> None:
    source = (
        "{% macro turn(m) %}{{ m.role | upper ~ ': ' + m.content.strip() * 1 }}{% endmacro %}"
        "{% for m in messages if m.content %}{{ turn(m) }}{{ 2 ** 10 }}{{ '-' * 3 }}"
        "{% if not loop.last %}|{% endif %}{% else %}none{% endfor %}"
    )
    messages = [{"role": "user", "content": f" {i} "} for i in range(500)]
    with limited_work():
        text = compile_template(source, ORIGIN).render(messages=messages)
    assert text == "|".join(f"USER: {i}1024---" for i in range(500))


def test_each_render_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_Budget", partial(templates._Budget, steps=1000))
    template = compile_template("{% for i in range(600) %}{% endfor %}done", ORIGIN)
    for _ in range(3):
        with limited_work():
            assert template.render() == "done"


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in %}",
        "{{ x | no_such_filter }}",
        "{% if true %}" * 500 + "{% endif %}" * 500,
        "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_a_broken_template_is_refused_with_its_remedy(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"the template is not valid Jinja \(.+\); mend it"):
        compile_template(source, ORIGIN)


def test_a_namespace_hides_what_it_is_given_later() -> None:
    spaces = [f"n{i}" for i in range(40)]
    source = "".join(f"{{% set {name} = namespace() %}}" for name in spaces) + "".join(
        f"{{% set {one}.x = [{other}, {other}] %}}" for one, other in itertools.pairwise(spaces)
    )
    with limited_work():
        assert compile_template(source + "{{ n0 }}", ORIGIN).render() == "<Namespace>"


def test_text_of_any_length_is_nobodys_to_make() -> None:
    template = compile_template("{{ lipsum(n=10000000) }}", ORIGIN)
    with limited_work(), pytest.raises(jinja2.UndefinedError):
        template.render()


def test_a_template_may_object() -> None:
    template = compile_template("{{ raise_exception('no system role') }}", ORIGIN)
    with limited_work(), pytest.raises(jinja2.TemplateError, match="no system role"):
        template.render()
