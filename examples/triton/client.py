"""Stream an answer from a Triton Inference Server; Ctrl-C stops it, and frees its place there.

pip install 'tritonclient[grpc]' && python examples/triton/client.py MODEL PROMPT HOST:PORT
"""

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

model, prompt, server = sys.argv[1:]
sampling = json.dumps({"temperature": 0.7, "seed": 1, "max_tokens": 64})
values: dict[str, Any] = {"text_input": prompt, "stream": True, "sampling_parameters": sampling}
inputs = []
for name, value in values.items():
    kind, array = ("BOOL", [value]) if isinstance(value, bool) else ("BYTES", [value.encode()])
    inputs.append(triton.InferInput(name, [1], kind).set_data_from_numpy(np.array(array)))
responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
final = False
with triton.InferenceServerClient(server) as client:
    client.start_stream(lambda result, error: responses.put(error or result))
    client.async_stream_infer(model, inputs)
    while not final:
        if isinstance(result := responses.get(), Exception):
            sys.exit(f"error: {result}")
        print(result.as_numpy("text_output")[0].decode(), end="", flush=True)
        final = result.get_response().parameters["triton_final_response"].bool_param
