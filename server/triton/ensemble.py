"""A Triton ensemble of one step that TensorRT-LLM's clients take for theirs: names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from slipstream.server.core.limits import MAX_N
from slipstream.server.triton.interface import GUIDES, INPUTS, OUTPUTS, PROMPT

NAME = "ensemble"
# TensorRT-LLM's name of an input, and ours.
ENSEMBLE_INPUTS: Mapping[str, str] = {
    name: name
    for name in (
        PROMPT, "max_tokens", "min_tokens", "num_return_sequences", "bad_words", "stop_words",
        "end_id", "pad_id", "top_k", "top_p", "temperature", "length_penalty",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "return_log_probs",
        "return_num_input_tokens", "return_num_output_tokens", "beam_width", "stream", *GUIDES,
    )
} | {
    "seed": "random_seed", "exclude_input_in_output": "exclude_input_in_single_output"
}  # fmt: skip
ENSEMBLE_OUTPUTS = (
    "text_output",
    "cum_log_probs",
    "output_log_probs",
    "num_input_tokens",
    "num_output_tokens",
)
# Triton puts a batch dimension before an output whose shape is the one declared here. The texts of
# TensorRT-LLM have none, so what is declared is longer than any answer.
_DIMS: Mapping[str, tuple[int, ...]] = {"text_output": (MAX_N + 1,)}
_CONFIG = """\
# Written by slipstream triton-repo --ensemble: TensorRT-LLM's names and shapes.
platform: "ensemble"
max_batch_size: 1
{tensors}
ensemble_scheduling {{
  step [ {{
    model_name: "{model}"
    model_version: -1
{maps}
  }} ]
}}
"""


def ensemble_config(model: str) -> str:
    """``config.pbtxt`` of an ensemble that passes everything on to ``model``."""
    return _CONFIG.format(model=model, tensors="\n".join(_tensors()), maps="\n".join(_maps()))


def _tensors() -> Iterator[str]:
    # All are optional: where one is not, a request without it has no answer, not even an error.
    for theirs, ours in ENSEMBLE_INPUTS.items():
        data_type, dims = INPUTS[ours].data_type, list(INPUTS[ours].dims)
        yield f'input {{ name: "{theirs}" data_type: {data_type} dims: {dims} optional: true }}'
    for name in ENSEMBLE_OUTPUTS:
        dims = list(_DIMS.get(name, OUTPUTS[name].dims))
        yield f'output {{ name: "{name}" data_type: {OUTPUTS[name].data_type} dims: {dims} }}'


def _maps() -> Iterator[str]:
    for theirs, ours in ENSEMBLE_INPUTS.items():
        yield f'    input_map {{ key: "{ours}" value: "{theirs}" }}'
    for name in ENSEMBLE_OUTPUTS:
        yield f'    output_map {{ key: "{name}" value: "{name}" }}'
