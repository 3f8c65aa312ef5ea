"""What all commands share: loading on first use, ``--verbose``, ``--debug`` and exit statuses."""

from __future__ import annotations

import logging
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, cast

import click
from click.shell_completion import CompletionItem

from slipstream.errors import SlipstreamError
from slipstream.server.text import printable

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
_ENDING = (signal.SIGTERM, signal.SIGHUP)
UNHEALTHY = 70  # EX_SOFTWARE of sysexits.h: the engine does not work any more; start it again
_MODELS = ("model", "checkpoint", "engine")  # arguments that may be a path
SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


class CommandError(click.ClickException):
    """An error of the user's that is no bad usage: one line on stderr, exit status 1."""

    def show(self, file: Any = None) -> None:  # noqa: ANN401 - as declared by click
        """Print the line."""
        click.echo(f"error: {printable(self.message)}", err=True, file=file)


class _ModelType(click.types.StringParamType):
    """A text that is a path or a hub id: of those, a shell knows the paths."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Let the shell complete a path."""
        return [CompletionItem(incomplete, type="file")]


class Command(click.Command):
    """A command whose errors end in one line on stderr.

    Exit status: 1 for a ``SlipstreamError``, 2 for bad usage, 130 for Ctrl-C, 143 for SIGTERM, and
    70 of a server whose engine has become unhealthy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - those of click.Command
        kwargs.setdefault("context_settings", SETTINGS)
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if parameter.name in _MODELS and parameter.type is click.STRING:
                parameter.type = _ModelType()
        self.params += [
            click.Option(
                ["--verbose"], is_flag=True, help="Log what is done, such as the compiler's passes."
            ),
            click.Option(["--debug"], is_flag=True, help="Show a traceback for an error."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of a command line; a text that looks like an option gets a hint."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            texts = [p for p in self.params if isinstance(p, click.Argument)]
            word = next((w for w in words if w.startswith(error.option_name)), "")
            if texts and not error.possibilities:
                raise click.UsageError(
                    f"{error.format_message().rstrip('.')}. To pass {shlex.quote(word)} as "
                    f"{texts[-1].human_readable_name}, put -- before it, behind all options",
                    ctx,
                ) from error
            raise

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        verbose, debug = ctx.params.pop("verbose"), ctx.params.pop("debug")
        with _log_to_stderr(logging.INFO if verbose else logging.WARNING), _cleanly_ended():
            try:
                return super().invoke(ctx)
            except SlipstreamError as error:
                if debug:
                    raise
                raise CommandError(str(error)) from error
            except KeyboardInterrupt:
                if debug:
                    raise
                click.echo(err=True)  # the terminal shows ^C in the middle of a line
                ctx.exit(INTERRUPTED)


class LazyGroup(click.Group):
    """Commands from a table ``name -> (module:attribute, one line of help)``.

    Help needs the table only, so it comes without importing a command.
    """

    def __init__(self, name: str, *, help: str, table: Mapping[str, tuple[str, str]]) -> None:
        super().__init__(name, help=help, context_settings=SETTINGS)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        return resolve(self.table[cmd_name][0]) if cmd_name in self.table else None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and options that begin so, again without importing a command."""
        commands = [
            CompletionItem(name, help=line)
            for name, (_, line) in self.table.items()
            if name.startswith(incomplete)
        ]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])


def resolve(path: str) -> click.Command:
    """The command at ``module:attribute``."""
    module, _, attribute = path.partition(":")
    return cast(click.Command, getattr(import_module(module), attribute))


@contextmanager
def _cleanly_ended() -> Iterator[None]:
    """What usually kills a process at once ends the block instead, like an error, so that what it
    has written is removed."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in _ENDING:  # cleaning up is not to be interrupted
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in _ENDING}
    for each, handler in before.items():
        if handler is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _EchoHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(printable(self.format(record), keep="\n"), err=True)


@contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    logger, handler = logging.getLogger("slipstream"), _EchoHandler(level)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
