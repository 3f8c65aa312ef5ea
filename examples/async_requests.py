"""Many requests in flight at once, one of them aborted half way.

python examples/async_requests.py ENGINE_OR_CHECKPOINT
"""

import asyncio
import sys

from slipstream import AsyncLLM, SamplingParams


async def answer(llm: AsyncLLM, number: int, prompt: str) -> None:
    """Stream one completion; leaving the loop aborts the request."""
    params = SamplingParams(temperature=0, max_tokens=40)
    tokens = 0
    async for output in llm.generate(prompt, params):
        tokens = len(output.outputs[0].token_ids)
        if number == 2 and tokens == 10:
            break
    print(f"request {number}: {tokens} tokens of {prompt!r}")


async def main(model: str) -> None:
    """Run four requests that share every step of the engine."""
    async with AsyncLLM(model) as llm:
        prompts = ["Water boils at", "The moon is", "In the beginning", "Bread is made of"]
        await asyncio.gather(*(answer(llm, i, prompt) for i, prompt in enumerate(prompts)))


asyncio.run(main(sys.argv[1]))
