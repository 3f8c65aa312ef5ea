"""Processes that were forked after an engine was loaded: its threads are not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio, os
from slipstream.errors import SlipstreamError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.llm import LLM
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_engine

params = SamplingParams(temperature=0, max_tokens=3)

async def ask():
    async for output in served.generate("a", params, output_kind="final"):
        return output.outputs[0].text

def told(ask):
    try:
        return ask()
    except SlipstreamError as error:
        return f"{type(error).__name__}: {error}"

def everything():
    print("async", told(lambda: asyncio.run(ask())), flush=True)
    print("sync", told(lambda: llm.generate("a", params)[0].outputs[0].text), flush=True)
    print("open", told(lambda: next(open_stream).outputs[0].text), flush=True)
    print("closed", served.closed, flush=True)

served, llm = AsyncLLM.from_engine(counting_engine()), LLM.from_engine(counting_engine())
open_stream = llm.stream("x", params)
next(open_stream)
child = os.fork()
if not child:
    everything()
    served.shutdown()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
everything()
served.shutdown()
"""


def test_an_engine_refuses_in_a_forked_process_and_goes_on_in_its_own() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    for name, said in lines[:4]:
        assert "Load the engine after the fork" in said, (name, said)
        assert said.startswith("ExecutionError: " if name != "closed" else "the engine was loaded")
    assert lines[4:] == [["async", "bcd"], ["sync", "bcd"], ["open", "yz"], ["closed", "None"]]
