"""Command line options from the dataclasses that hold their defaults."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from slipstream.builder.options import BuildOptions
from slipstream.errors import SlipstreamError
from slipstream.quantize.options import QuantizeOptions
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.options import ServerOptions
from slipstream.server.option_tables import BUILD, QUANTIZE, RUNTIME, SAMPLING, SERVER, Option

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class _Runtime(RuntimeConfig):
    """What loading takes in other words, too."""

    speculative_config: str | None = None


def output_option(help: str, *, required: bool = False) -> Decorator:
    """``-o DIRECTORY``; the command gets ``output: Path | None``."""
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path), required=required, help=help
    )


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add every field of ``ServerOptions``; the command gets ``server: ServerOptions``."""
    return all_of(ServerOptions, SERVER, "server")(function)


def build_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add every field of ``BuildOptions``; the command gets ``options: BuildOptions``."""
    return all_of(BuildOptions, BUILD, "options")(function)


def quantize_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add every field of ``QuantizeOptions``; the command gets ``options: QuantizeOptions``."""
    return all_of(QuantizeOptions, QUANTIZE, "options")(function)


def runtime_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of ``RuntimeConfig``; the command gets those given as ``runtime: dict``."""
    return _collect(_Runtime, RUNTIME, "runtime", lambda values: values)(function)


def unwatched_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``runtime_options`` of a command that nobody serves: it waits for its device for ever."""
    table = {name: option for name, option in RUNTIME.items() if name != "step_timeout"}
    return _collect(_Runtime, table, "runtime", lambda values: values)(function)


def sampling_options(*names: str) -> Decorator:
    """Add fields of ``SamplingParams``; the command gets those given as ``sampling: dict``."""

    def checked(values: dict[str, Any]) -> dict[str, Any]:
        _checked(SamplingParams, values)
        return values

    return _collect(SamplingParams, {name: SAMPLING[name] for name in names}, "sampling", checked)


def all_of(cls: type, table: Mapping[str, Option], parameter: str) -> Decorator:
    """Every field of a dataclass; the command gets an instance as ``parameter``."""
    return _collect(cls, table, parameter, functools.partial(_checked, cls))


def _checked(cls: Callable[..., Any], values: dict[str, Any]) -> Any:  # noqa: ANN401
    try:
        return cls(**values)
    except SlipstreamError as error:
        raise click.UsageError(str(error)) from error


def _collect(
    cls: type, table: Mapping[str, Option], parameter: str, check: Callable[[dict[str, Any]], Any]
) -> Decorator:
    """A decorator that adds options and passes the ones given as one ``parameter``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(**values: Any) -> object:  # noqa: ANN401 - options of any type
            given = {name: values.pop(name) for name in table}
            for name, option in table.items():
                _check_environment(option, given[name])
            given = {name: value for name, value in given.items() if value not in (None, ())}
            return function(**{parameter: check(given)}, **values)

        command: Callable[..., Any] = wrapper
        for option in reversed(_click_options(cls, table)):
            command = option(command)
        return command

    return decorate


def _check_environment(option: Option, value: object) -> None:
    """Refuse a variable that is set to nothing: click takes it for one that is not set, and who
    meant to lock a server would have left it open."""
    blank = option.envvar is not None and not os.environ.get(option.envvar, "unset").strip()
    if blank and value in (None, ()):
        raise click.UsageError(f"{option.envvar} is set, but empty; give a value, or unset it")


def _click_options(cls: type, table: Mapping[str, Option]) -> list[Decorator]:
    types = get_type_hints(cls)
    defaults = {field.name: field.default for field in fields(cls)}
    made: list[Decorator] = []
    for name, option in table.items():
        default = defaults[name]
        assert default is not MISSING, f"{cls.__name__}.{name} has no default"
        # The default is None, so that what was not given is left to the model or the engine.
        text = f"{option.help}  [default: {option.default or _shown(default, option)}]"
        flag, kind = _flag(name, types[name], option), _type(types[name], option)
        made.append(click.option(flag, name, default=None, help=text, envvar=option.envvar, **kind))
    return made


def _shown(default: object, option: Option) -> str:
    if not isinstance(default, bool):
        return str(default)
    on, _, off = (option.flag or "on/--off").partition("/--")
    return on if default else off


def _flag(name: str, hint: object, option: Option) -> str:
    flag = option.flag or name.replace("_", "-")
    return f"--{flag}/--no-{flag}" if hint is bool and option.flag is None else f"--{flag}"


def _type(hint: Any, option: Option) -> dict[str, Any]:  # noqa: ANN401 - a type hint
    """How click is to parse a field."""
    if option.parse is not None:
        return {"type": option.parse}
    if isinstance(hint, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return {"type": click.Choice(get_args(hint))}
    if get_origin(hint) is Sequence:
        return {"type": get_args(hint)[0], "multiple": True}
    if hint is bool:
        return {"is_flag": True}
    return {"type": click.IntRange(min=option.least) if option.least is not None else hint}
