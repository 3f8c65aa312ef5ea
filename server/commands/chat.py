"""``slipstream chat``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from slipstream.server.command import Command
from slipstream.server.core.sampling import describe_sampling
from slipstream.server.models import load_model
from slipstream.server.option_tables import SAMPLING
from slipstream.server.options import runtime_options, sampling_options

_SETTABLE = tuple(name for name in SAMPLING if name not in ("n", "logprobs"))


@click.command(cls=Command)
@click.argument("model")
@click.option("--system", help="System prompt: who the model is to be.")
@sampling_options(*_SETTABLE)
@runtime_options
def chat(model: str, system: str | None, sampling: dict[str, Any], runtime: dict[str, Any]) -> None:
    '''Chat with a model in the terminal.

    MODEL is an engine, or a checkpoint, which is compiled on first use; it must have a chat
    template. /help lists what can be said to the chat itself; """ begins and ends a message of
    several lines; Ctrl-C stops an answer and Ctrl-D leaves. When the conversation grows longer than
    max-seq-len, the oldest turns are dropped. Without a terminal, every line of standard input is
    a message and only the answers are printed.

    \b
    Examples:
      slipstream chat engine --temperature 0.7 --top-p 0.9
      slipstream chat Qwen/Qwen3-0.6B --system "You answer in one sentence." --max-seq-len 4096
    '''
    engine = load_model(model, runtime)
    # Imported here, with what they need, so that bad usage is reported at once.
    from slipstream.runtime.async_llm import AsyncLLM
    from slipstream.runtime.pooling import require_text
    from slipstream.server.chat.session import ChatSession
    from slipstream.server.chat.terminal import create_terminal

    require_text(engine.pooling)
    engine.tokenizer.apply_chat_template([{"role": "user", "content": "?"}])  # says what is missing
    terminal = create_terminal()
    llm = AsyncLLM.from_engine(engine)
    try:
        params = replace(engine.interactive_defaults, **sampling)
        terminal.notice(f"{model}: /help for help, Ctrl-D to leave")
        terminal.notice(describe_sampling(params))
        ChatSession(
            llm,
            terminal,
            params,
            max_seq_len=engine.config.max_seq_len,
            settable=_SETTABLE,
            system=system,
        ).run()
    finally:
        llm.shutdown()
        terminal.close()
