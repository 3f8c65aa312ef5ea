"""``slipstream generate``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from slipstream.server.command import Command
from slipstream.server.core.sampling import describe_sampling
from slipstream.server.core.usage import Usage
from slipstream.server.models import load_model
from slipstream.server.option_tables import SAMPLING
from slipstream.server.options import sampling_options, unwatched_options
from slipstream.server.text import echo_answer

if TYPE_CHECKING:
    from slipstream.runtime.engine.step import TokenLogprobs
    from slipstream.runtime.llm import LLM
    from slipstream.runtime.request import CompletionOutput, RequestOutput
    from slipstream.runtime.sampling.params import SamplingParams
    from slipstream.runtime.text.tokenizer import Tokenizer

Prompt = str | list[dict[str, str]]


@click.command(cls=Command)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--chat/--raw",
    default=None,
    help="Put the prompt into the model's chat template, or send it as it is to be continued.  "
    "[default: --chat for a model that has a template]",
)
@sampling_options(*SAMPLING)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object with texts, reasons and usage."
)
@click.option("--stats", is_flag=True, help="Print sampling, tokens and times on stderr.")
@unwatched_options
def generate(
    model: str,
    prompt: str | None,
    chat: bool | None,
    sampling: dict[str, Any],
    as_json: bool,
    stats: bool,
    runtime: dict[str, Any],
) -> None:
    """Answer PROMPT, or what comes on standard input, and print the answer as it is made.

    MODEL is an engine, or a checkpoint, which is compiled on first use. A model with a chat
    template gets PROMPT as a user's message; --raw has it continue PROMPT instead. A terminal gets
    answers without control sequences, and how they were sampled; a file or a pipe gets them as they
    are.

    \b
    Examples:
      slipstream generate engine "Why is the sky blue?" --temperature 0 --max-tokens 100
      git diff | slipstream generate engine --stats
      slipstream generate engine --raw "Once upon a time" --json --logprobs 2
    """
    if "logprobs" in sampling and not as_json:
        raise click.UsageError("--logprobs needs --json, which is where they are printed")
    text = _prompt(prompt)
    engine = load_model(model, runtime)
    # Imported here, with what it needs, so that bad usage is reported at once.
    from slipstream.runtime.llm import LLM

    with LLM.from_engine(engine) as llm:
        as_chat = llm.tokenizer.has_chat_template if chat is None else chat
        request: Prompt = [{"role": "user", "content": text}] if as_chat else text
        params = replace(engine.interactive_defaults, **sampling)
        if stats or sys.stderr.isatty():
            click.secho(describe_sampling(params), err=True, dim=True)
        usage = (_print_json if as_json else _print_text)(llm, request, params)
    if stats:
        click.echo(usage.describe(), err=True)


def _prompt(argument: str | None) -> str:
    if argument is not None:
        return argument
    if sys.stdin.isatty():
        raise click.UsageError("give a PROMPT, or pipe one to standard input")
    return sys.stdin.read().removesuffix("\n")


def _print_text(llm: LLM, prompt: Prompt, params: SamplingParams) -> Usage:
    """One answer streams; of several only the end can be told apart, so they come one by one."""
    if params.n == 1:
        usage = Usage()
        for output in llm.stream(prompt, params, output_kind="delta"):
            usage.add(output)
            echo_answer(output.outputs[0].text, nl=False)
        click.echo()
        return usage
    output = _final(llm, prompt, params)
    for completion in output.outputs:
        echo_answer(f"=== {completion.index + 1} of {params.n} ===\n{completion.text}")
    return Usage().add(output)


def _print_json(llm: LLM, prompt: Prompt, params: SamplingParams) -> Usage:
    output = _final(llm, prompt, params)
    usage = Usage().add(output)
    report = {
        "choices": [_choice(completion, llm.tokenizer) for completion in output.outputs],
        "sampling": {name: getattr(params, name) for name in SAMPLING},
        "usage": usage.tokens(),
        "timing": usage.timing(),
    }
    echo_answer(json.dumps(report, indent=2, ensure_ascii=False))
    return usage


def _final(llm: LLM, prompt: Prompt, params: SamplingParams) -> RequestOutput:
    (output,) = llm.stream(prompt, params, output_kind="final")
    return output


def _choice(completion: CompletionOutput, tokenizer: Tokenizer) -> dict[str, object]:
    choice = asdict(completion)
    if completion.logprobs is not None:
        choice["logprobs"] = [_logprobs(entry, tokenizer) for entry in completion.logprobs]
    return choice


def _logprobs(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, object]:
    def described(token: int, logprob: float, rank: int) -> dict[str, object]:
        text = tokenizer.decode([token], skip_special_tokens=False)
        return {"token": text, "token_id": token, "logprob": logprob, "rank": rank}

    top = [described(token, *values) for token, values in entry.top.items()]
    return {**described(entry.token_id, entry.logprob, entry.rank), "top": top}
