"""``slipstream completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from slipstream.server.command import Command

_SHELLS = ("bash", "zsh", "fish")
_PROGRAMS = ("slipstream", "slipstream-build", "slipstream-quantize")


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print what completes commands, options and their values in a shell.

    The shell asks the command itself at every tab, so a newer Slipstream needs no new script. To
    keep it, put the line of the example into ~/.bashrc or ~/.zshrc (behind compinit), or the output
    into ~/.config/fish/completions/slipstream.fish.

    \b
    Examples:
      eval "$(slipstream completion bash)"
      eval "$(slipstream completion zsh)"
      slipstream completion fish | source
    """
    for program in _PROGRAMS:
        click.echo(_script(shell, program))


def _script(shell: str, program: str) -> str:
    kind = get_completion_class(shell)
    assert kind is not None, shell
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    return kind(click.Command(program), {}, program, variable).source()
