"""The inputs and outputs of a served model: vLLM's names, and those of TensorRT-LLM's ensemble;
what belongs to conversations has OpenAI's.

Triton completes a model's configuration from these tables, and requests are read by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DataType = Literal[
    "TYPE_BOOL", "TYPE_INT32", "TYPE_UINT32", "TYPE_UINT64", "TYPE_FP32", "TYPE_STRING"
]
ANY_LENGTH = -1
PROMPT = "text_input"
MESSAGES = "messages"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output; ``dims`` are its numbers of elements.

    ``field`` is the sampling parameter that an input sets, None for one that sets none.
    """

    data_type: DataType
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    field: str | None = None

    def describe(self, name: str) -> dict[str, object]:
        """The tensor in the form of Triton's ``ModelConfig.add_input`` and ``add_output``."""
        described: dict[str, object] = {
            "name": name,
            "data_type": self.data_type,
            "dims": list(self.dims),
        }
        if self.optional:
            described["optional"] = True
        return described


# What decides how the answer is told.
SWITCHES: Mapping[str, Tensor] = {
    "stream": Tensor("TYPE_BOOL"),
    "exclude_input_in_output": Tensor("TYPE_BOOL"),
    # As TensorRT-LLM reads the input above: in no case does a stream begin with the prompt.
    "exclude_input_in_single_output": Tensor("TYPE_BOOL"),
    "return_finish_reason": Tensor("TYPE_BOOL"),
    "return_cumulative_logprob": Tensor("TYPE_BOOL"),
    "return_logprobs": Tensor("TYPE_BOOL"),
    "return_num_input_tokens": Tensor("TYPE_BOOL"),
    "return_num_output_tokens": Tensor("TYPE_BOOL"),
    "return_log_probs": Tensor("TYPE_BOOL"),
}
# Sampling parameters that have an input of their own; all others come in `sampling_parameters`.
SAMPLING: Mapping[str, Tensor] = {
    "max_tokens": Tensor("TYPE_INT32", field="max_tokens"),
    "min_tokens": Tensor("TYPE_INT32", field="min_tokens"),
    "temperature": Tensor("TYPE_FP32", field="temperature"),
    "top_k": Tensor("TYPE_INT32", field="top_k"),
    "top_p": Tensor("TYPE_FP32", field="top_p"),
    "repetition_penalty": Tensor("TYPE_FP32", field="repetition_penalty"),
    "presence_penalty": Tensor("TYPE_FP32", field="presence_penalty"),
    "frequency_penalty": Tensor("TYPE_FP32", field="frequency_penalty"),
    "random_seed": Tensor("TYPE_UINT64", field="seed"),
    "stop_words": Tensor("TYPE_STRING", (ANY_LENGTH,), field="stop"),
    "bad_words": Tensor("TYPE_STRING", (ANY_LENGTH,), field="bad_words"),
    "num_return_sequences": Tensor("TYPE_INT32", field="n"),
    "end_id": Tensor("TYPE_INT32", field="stop_token_ids"),
}
# A conversation in place of a prompt, and what belongs to it.
CHAT: Mapping[str, Tensor] = {
    MESSAGES: Tensor("TYPE_STRING"),
    "tools": Tensor("TYPE_STRING"),
    "tool_choice": Tensor("TYPE_STRING"),
    "reasoning_effort": Tensor("TYPE_STRING"),
}
# What the answer must look like, as TensorRT-LLM has it.
GUIDE_TYPE, GUIDE = "guided_decoding_guide_type", "guided_decoding_guide"
GUIDES: Mapping[str, Tensor] = {GUIDE_TYPE: Tensor("TYPE_STRING"), GUIDE: Tensor("TYPE_STRING")}
# What clients of TensorRT-LLM send of beams and of padding, which do not exist here.
WITHOUT_MEANING: Mapping[str, Tensor] = {
    "beam_width": Tensor("TYPE_INT32"),
    "length_penalty": Tensor("TYPE_FP32"),
    "pad_id": Tensor("TYPE_INT32"),
}
INPUTS: Mapping[str, Tensor] = {
    PROMPT: Tensor("TYPE_STRING"),
    **CHAT,
    "sampling_parameters": Tensor("TYPE_STRING"),
    **SWITCHES,
    **SAMPLING,
    **GUIDES,
    **WITHOUT_MEANING,
}
# An entry for each of the `n` completions, except of the prompt's tokens.
OUTPUTS: Mapping[str, Tensor] = {
    "text_output": Tensor("TYPE_STRING", (ANY_LENGTH,), optional=False),
    "reasoning_output": Tensor("TYPE_STRING", (ANY_LENGTH,), optional=False),
    "tool_calls": Tensor("TYPE_STRING", (ANY_LENGTH,), optional=False),
    "finish_reason": Tensor("TYPE_STRING", (ANY_LENGTH,), optional=False),
    "cumulative_logprob": Tensor("TYPE_FP32", (ANY_LENGTH,), optional=False),
    "logprobs": Tensor("TYPE_STRING", (ANY_LENGTH,), optional=False),
    "num_input_tokens": Tensor("TYPE_UINT32", optional=False),
    "num_output_tokens": Tensor("TYPE_UINT32", (ANY_LENGTH,), optional=False),
    "cum_log_probs": Tensor("TYPE_FP32", (ANY_LENGTH,), optional=False),
    "output_log_probs": Tensor("TYPE_FP32", (ANY_LENGTH, ANY_LENGTH), optional=False),
}
