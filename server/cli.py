"""The ``slipstream`` command: a table of commands, each imported when it is used."""

from __future__ import annotations

import logging
import os
import sys

import click

from slipstream import __version__
from slipstream.server.command import UNHEALTHY, LazyGroup, resolve

_COMMANDS = "slipstream.server.commands"

bench = LazyGroup(
    "bench",
    help="Measure an engine on this machine, with random prompts of a fixed length.",
    table={
        "latency": (
            f"{_COMMANDS}.bench_latency:latency",
            "Time to first token and between tokens of one batch.",
        ),
        "throughput": (
            f"{_COMMANDS}.bench_throughput:throughput",
            "Tokens per second of many requests in flight.",
        ),
    },
)

cache = LazyGroup(
    "cache",
    help="""Look after the engines that were compiled on the way.

    A checkpoint that is given instead of an engine is compiled on first use and its engine kept in
    $XDG_CACHE_HOME/slipstream/engines, by default under ~/.cache. When they take more than
    SLIPSTREAM_CACHE_SIZE, by default 100G, those that were used longest ago are removed.
    """,
    table={
        "list": (f"{_COMMANDS}.cache:list_engines", "Engines, their sizes and their checkpoints."),
        "prune": (f"{_COMMANDS}.cache:prune_engines", "Remove what is not needed."),
    },
)

slipstream = LazyGroup(
    "slipstream",
    help="""Compile language models into quantized engines and run them.

    \b
    Two commands from a checkpoint to an answer:
      slipstream build SmolLM2-135M-Instruct.Q4_1.gguf -o engine
      slipstream generate engine "Why is the sky blue?"

    A model is an engine directory, a Hugging Face directory, a .gguf file or a hub id; a checkpoint
    is compiled on first use and the engine kept in the cache.
    """,
    table={
        "build": (f"{_COMMANDS}.build:build", "Compile a checkpoint into an engine."),
        "quantize": (f"{_COMMANDS}.quantize:quantize", "Quantize a checkpoint, with a report."),
        "convert": (f"{_COMMANDS}.convert:convert", "Change the layout of a quantized checkpoint."),
        "generate": (f"{_COMMANDS}.generate:generate", "Answer one prompt."),
        "chat": (f"{_COMMANDS}.chat:chat", "Chat with a model in the terminal."),
        "serve": (f"{_COMMANDS}.serve:serve", "Serve a model over OpenAI's HTTP interface."),
        "triton-repo": (
            f"{_COMMANDS}.triton_repo:triton_repo",
            "Write a model repository for the Triton Inference Server.",
        ),
        "dynamo-worker": (
            f"{_COMMANDS}.dynamo_worker:dynamo_worker",
            "Answer requests of NVIDIA Dynamo's frontends.",
        ),
        "bench": (f"{__name__}:bench", "Measure an engine on this machine."),
        "inspect": (f"{_COMMANDS}.inspect:inspect", "Show what is inside an engine."),
        "cache": (f"{__name__}:cache", "List and remove engines that were compiled on the way."),
        "doctor": (
            f"{_COMMANDS}.doctor:doctor",
            "Show what this machine has, what it can build and run, and how to mend what it lacks.",
        ),
        "completion": (
            f"{_COMMANDS}.completion:completion",
            "Print what completes commands, options and their values in a shell.",
        ),
        "eval": (f"{_COMMANDS}.eval:evaluate", "Measure what an engine predicts."),
    },
)
click.version_option(__version__, prog_name="slipstream")(slipstream)


def main() -> None:
    """Run ``slipstream``.

    A server whose engine has become unhealthy ends here: what Python and CUDA do at the end of a
    process would wait for a device that hangs.
    """
    try:
        slipstream.main(prog_name="slipstream")
    except SystemExit as ending:
        if ending.code != UNHEALTHY:
            raise
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(UNHEALTHY)


def build_main() -> None:
    """Run ``slipstream build`` under its own name."""
    resolve(f"{_COMMANDS}.build:build").main(prog_name="slipstream-build")


def quantize_main() -> None:
    """Run ``slipstream quantize`` under its own name."""
    resolve(f"{_COMMANDS}.quantize:quantize").main(prog_name="slipstream-quantize")


if __name__ == "__main__":
    main()
