"""What a template would make too much of is refused before there is memory for it."""

from __future__ import annotations

import tracemalloc

import pytest
from jinja2.exceptions import SecurityError

from slipstream.weights.json import Origin
from slipstream.weights.template_sizes import TemplateLimitError
from slipstream.weights.templates import compile_template, limited_work

ORIGIN = Origin("the template", "mend it")
GIVEN = {
    "n": 999_999_999,
    "long": "b" * 100_000,
    "lines": "\n" * 20_000,
    "tabs": "\t" * 20_000,
    "wide": "\U000e0001" * 300_000,
    "percents": "%%" * 100_000,
    "fields": "{0}" * 25_000,
    "many": [1] * 20_000,
    "deep": [[[[[[[[1] * 1000]]]]]]],
}
TOO_LONG = {
    "width": "{{ '%999999999d' % 1 }}",
    "precision": "{{ '%.999999999f' % 1.5 }}",
    "width_of_a_name": "{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}",
    "width_among_the_values": "{{ '%*d' % (n, 1) }}",
    "value_named_often": "{{ ('%(a)s' * 1000) % {'a': long} }}",
    "widths_together": "{{ ('%99999d' * 500) % many[:500] | list }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format_precision": "{{ '{:.999999999f}'.format(1.5) }}",
    "format_width_among_the_values": "{{ '{:{}}'.format(1, n) }}",
    "format_value_named_often": "{{ ('{0}' * 1000).format(long) }}",
    "format_map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "format_of_markup": "{{ ('{:999999999}' | safe).format(1) }}",
    "format_filter": "{{ '%999999999d' | format(1) }}",
    "tojson_indent": "{{ many | tojson(indent=99999) }}",
    "tojson_indent_text": "{{ many | tojson(indent=long) }}",
    "tojson_indent_of_depth": "{{ deep | tojson(indent=9000) }}",
    "tojson_separators": "{{ many | tojson(separators=[long, long]) }}",
    "indent": "{{ 'a\nb' | indent(n) }}",
    "indent_text": "{{ ('\n' * 5000) | indent(long) }}",
    "center": "{{ 'a'.center(n) }}",
    "ljust": "{{ 'a'.ljust(n) }}",
    "rjust": "{{ 'a'.rjust(n) }}",
    "zfill": "{{ 'a'.zfill(n) }}",
    "attr": "{{ ('a' | attr('ljust'))(n) }}",
    "center_filter": "{{ 'a' | center(width=n) }}",
    "expandtabs": "{{ tabs.expandtabs(99999) }}",
    "replace": "{{ long.replace('b', long) }}",
    "replace_of_nothing": "{{ long.replace('', long) }}",
    "replace_filter": "{{ long | replace('b', long) }}",
    "translate": "{{ long.translate({98: long}) }}",
    "join": "{{ long.join(long) }}",
    "join_of_a_generator": "{{ long.join(many | map('string')) }}",
    "join_filter": "{{ many | join(long) }}",
    "text_repeated": "{{ 'a' * n }}",
    "lists_repeated": "{{ [1] * 99999999 }}",
    "tuples_repeated": "{{ (1, 2) * 99999999 }}",
    "added": "{{ long * 300 + long * 300 }}",
    "concatenated": "{{ long * 200 ~ long * 200 }}",
    "listed": "{{ (long * 100) | list }}",
    "split": "{{ (long * 100).split('b') }}",
    "lines": "{{ (lines * 100).splitlines() }}",
    "batch": "{{ [1] | batch(n, 0) | list }}",
    "slice": "{{ [1] | slice(n) | list }}",
    "round": "{{ 1.5 | round(n) }}",
    "urlize": "{{ ('http://a.b ' * 5000) | urlize(target=long) }}",
    "wordwrap": "{{ ('a ' * 9000) | wordwrap(1, wrapstring=long) }}",
    "wide": "{% set a = wide * 13 %}" + "{% set a = a ~ 'b' %}" * 9,
    "escapes": "{{ '%a' % (wide * 9) }}",
    "escapes_of_a_field": "{{ '{!a}'.format(wide * 9) }}",
    "escapes_of_a_list": "{{ [wide * 9] | string }}",
    "escapes_of_what_is_put_out": "{{ [wide * 9] }}",
    "time": "{{ strftime_now('%9999999d' * 10) }}",
    "time_of_any_length": "{{ strftime_now('%c' * 9999999) }}",
}
TOO_SLOW = {
    "percents": "{{ (percents * 40) % [] }}",
    "fields": "{{ (fields * 4).format(1) }}",
    "attributes_of_a_field": "{{ ('{0' ~ '.real' * 20_000 ~ '}').format(1) }}",
    "number": "{{ long | int(0, 16) % 7 }}",
}
AS_EVER = {
    "{{ '%5.2f|%-4s|%(x)s' | replace('%(x)s', '') % (1.5, 'a') }}": " 1.50|a   |",
    "{{ '%(a)s %%' % {'a': [1, 'b']} }}": "[1, 'b'] %",
    "{{ '{:>{w}}|{a[b]}'.format(7, w=3, a={'b': 1}) }}": "  7|1",
    "{{ '{a:,}'.format_map({'a': 131072}) }}": "131,072",
    "{{ {'a': [1, 'é']} | tojson }}": '{"a": [1, "é"]}',
    "{{ {'a': 1} | tojson(indent=2) }}": '{\n  "a": 1\n}',
    "{{ 'aXbXc'.replace('X', '--', 1) }}": "a--bXc",
    "{{ ', '.join(['a', 'b'] | map('upper')) }}": "A, B",
    "{{ [{'x': 1}, {'x': 2}] | join(';', attribute='x') }}": "1;2",
    "{{ missing | default(131072) }}": "131072",
    "{{ [200000, 1] | select('gt', 150000) | list }}": "[200000]",
    "{{ 2.345 | round(2) ~ 1 ~ none ~ 'abc'[1:] }}": "2.351Nonebc",
    "{% autoescape true %}{{ (x | safe) ~ x }}{% endautoescape %}": "<&lt;",
    "{{ 'a b\nc'.split() ~ 'a\nb'.splitlines() }}": "['a', 'b', 'c']['a', 'b']",
    "{{ 'a\nb' | indent(2) ~ '7'.zfill(3) ~ 'a'.center(3) }}": "a\n  b007 a ",
    "{{ strftime_now('%%') }}": "%",
}


@pytest.mark.parametrize("source", TOO_LONG.values(), ids=TOO_LONG)
def test_a_text_is_refused_before_it_is_made(source: str) -> None:
    template = compile_template(source, ORIGIN)
    tracemalloc.start()
    try:
        with limited_work(), pytest.raises(TemplateLimitError):
            template.render(GIVEN)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80 << 20


@pytest.mark.parametrize("source", TOO_SLOW.values(), ids=TOO_SLOW)
def test_what_no_clock_can_stop_is_refused_before_it_begins(source: str) -> None:
    template = compile_template(source, ORIGIN)
    with limited_work(), pytest.raises(TemplateLimitError, match="more characters or digits"):
        template.render(GIVEN)


def test_numbers_are_made_of_no_bytes() -> None:
    with limited_work(), pytest.raises(SecurityError):
        compile_template("{{ (1).from_bytes([255] * 9, 'big') }}", ORIGIN).render()


@pytest.mark.parametrize(("source", "text"), AS_EVER.items())
def test_what_is_measured_is_made_as_ever(source: str, text: str) -> None:
    with limited_work():
        assert compile_template(source, ORIGIN).render(x="<") == text


def test_views_of_a_dict_count_as_what_they_show() -> None:
    source = (
        "{% set ns = namespace(x={1: 1}) %}{% for i in range(64) %}"
        "{% set ns.x = {1: ns.x.items(), 2: ns.x.items()} %}{% endfor %}{{ ns.x }}"
    )
    with limited_work(), pytest.raises(TemplateLimitError):
        compile_template(source, ORIGIN).render()


def test_a_prompt_of_a_million_tokens_is_not_too_long() -> None:
    source = "{{ x.strip() | trim }}{% if x.startswith('b') %}{{ x | length }}{% endif %}"
    with limited_work():
        assert compile_template(source, ORIGIN).render(x="é" * 5_000_000) == "é" * 5_000_000


def test_parts_of_a_text_count() -> None:
    source = "{% set a = x[1:] %}" * 9
    with limited_work(), pytest.raises(TemplateLimitError, match="stopped after"):
        compile_template(source, ORIGIN).render(x="a" * 10_000_000)
