"""Complete two prompts in one batch, then stream a chat answer.

python examples/quickstart.py ENGINE_OR_CHECKPOINT
"""

import sys

from slipstream import LLM, SamplingParams

with LLM(sys.argv[1]) as llm:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=48, seed=1)
    for output in llm.generate(["The capital of France is", "Once upon a time"], params):
        print(output.prompt, "→", output.outputs[0].text)
    messages = [{"role": "user", "content": "Name three rivers."}]
    for output in llm.stream(messages, params, output_kind="delta"):
        print(output.outputs[0].text, end="", flush=True)
    print()
