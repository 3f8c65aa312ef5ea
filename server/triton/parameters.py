"""From what a client sent to a checked request.

Sampling parameters come as inputs (``temperature``), as JSON in the input ``sampling_parameters``,
or as parameters of the request, which is where ``/generate`` puts every key that is no input; so
may what belongs to a conversation, and the guides of an answer's form. What is not known, or is
said twice and differently, is refused; but clients of vLLM's backend repeat in parameters of the
request what they send as a tensor, and there the tensor counts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.limits import MAX_TEXTS
from slipstream.server.core.sampling import DEFAULT_COMPLETION_TOKENS, FIELDS, sampling_params
from slipstream.server.triton.chat import conversation_of
from slipstream.server.triton.guides import guided
from slipstream.server.triton.interface import (
    CHAT,
    GUIDE,
    GUIDE_TYPE,
    GUIDES,
    MESSAGES,
    PROMPT,
    SAMPLING,
    SWITCHES,
    WITHOUT_MEANING,
)

Inputs = Mapping[str, NDArray[Any]]

# No output tells log probabilities of the prompt; which tokens are shown is the dialect's to say.
_FIELDS = FIELDS - {"prompt_logprobs", "shown_special_tokens"}
# What is read when all is there; empty text stands for nothing.
_LATER = frozenset({*CHAT, *GUIDES})
_KNOWN = frozenset({*_FIELDS, *SWITCHES, *_LATER})
# The fields that are text themselves, so that text is not read as JSON.
_TEXTS = frozenset({"stop", "bad_words"})
_RETURNS = "return_"
# What Triton's OpenAI frontend sends where its own client says nothing.
_UNSAID = {"best_of": "1", "logprobs": "False"}
# The outputs that are made of log probabilities and can be asked for without saying how many.
_FROM_LOGPROBS = frozenset({"cumulative_logprob", "cum_log_probs", "output_log_probs"})
_PARAMETER = "a parameter of the request"
# More than the limits of all parameters can fill.
_MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Query:
    """A checked request: what to continue or to answer, how, and what to tell of it.

    ``returns`` names outputs beside ``text_output``. ``echo``: the text begins with the prompt.
    ``logprobs``: the client said how many; without, the output of that name is null. ``fields``:
    what the client calls a parameter, where that is another name.
    """

    prompt: str | Conversation
    params: SamplingParams
    stream: bool
    echo: bool
    returns: frozenset[str]
    logprobs: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)


def read_query(
    inputs: Inputs,
    parameters: Mapping[str, Any],
    defaults: SamplingParams,
    tokenizer: Tokenizer,
    request_id: str = "",
) -> Query:
    """Check a request whose sampling starts from ``defaults``.

    ``inputs`` are arrays as Triton's Python backend has them: text as bytes. Raises
    ``InvalidRequestError`` naming what is wrong.
    """
    given = _Given()
    for name, array in inputs.items():
        if name in SAMPLING:
            given.add(name, _sampling_input(name, array), "an input")
        elif name in SWITCHES:
            given.add(name, bool(_single(name, array)), "an input")
        elif name in _LATER:
            given.add(name, _text(name, _single(name, array)), "an input")
        elif name in WITHOUT_MEANING:
            given.add(name, _single(name, array).item(), "an input")
    if "sampling_parameters" in inputs:
        for name, value in _sampling_parameters(inputs["sampling_parameters"]).items():
            given.add(name, value, "one of sampling_parameters")
    for name, value in parameters.items():
        if not _is_tritons(name, value, request_id):
            given.add(name, value, _PARAMETER)
    return _query(_prompt(inputs, given), given, defaults, tokenizer)


def _prompt(inputs: Inputs, given: _Given) -> str | Conversation:
    """What is to be continued, or the conversation that is to be answered."""
    chat = given.of(CHAT)
    if MESSAGES in chat:
        if PROMPT in inputs:
            raise InvalidRequestError(f"{PROMPT} and {MESSAGES} are both given; send one of them")
        return conversation_of(chat)
    if chat:
        raise InvalidRequestError(
            f"{next(iter(chat))} belongs to a conversation; send that as {MESSAGES}"
        )
    if PROMPT not in inputs:
        raise InvalidRequestError(
            f"{PROMPT} is missing; send the prompt as one text, or {MESSAGES}"
        )
    return _text(PROMPT, _single(PROMPT, inputs[PROMPT]))


class _Given:
    """What was given, by field, and under which name."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._names: dict[str, tuple[str, str]] = {}

    def of(self, fields: Collection[str]) -> dict[str, Any]:
        """The values of these."""
        return {name: value for name, value in self._values.items() if name in fields}

    def add(self, name: str, value: object, how: str) -> None:
        """Take a value under the name that the client used; null is as if it were not there."""
        if value is None or (name in _UNSAID and str(value) == _UNSAID[name]):
            return
        if name in _LATER and value == "":
            return
        field = SAMPLING[name].field if name in SAMPLING else name
        assert field is not None
        if field in WITHOUT_MEANING:
            _check_without_meaning(name, value)
        elif field not in _KNOWN:
            raise InvalidRequestError(
                f"unknown parameter {name!r:.80}, given as {how}; known are {', '.join(_known())}"
            )
        elif field in self._names:
            self._repeat(name, field, value, how)
        else:
            self._names[field] = (name, how)
            self._values[field] = _value(name, value)

    def _repeat(self, name: str, field: str, value: object, how: str) -> None:
        """Take note of a field that is given once more: of no other value, or a tensor counts."""
        first, way = self._names[field]
        if (how == _PARAMETER != way) or self._values[field] == _value(name, value):
            return
        raise InvalidRequestError(
            f"{name} is given twice: as {way} and as {how}; give it once"
            if name == first
            else f"{first} (given as {way}) and {name} (given as {how}) are the same parameter;"
            " give one of them"
        )

    def call(self, field: str, name: str) -> None:
        """Say under which name a field was given that is made of others."""
        self._names[field] = (name, "an input")

    def explain(self, error: InvalidRequestError) -> str:
        """An error of sampling parameters in the client's own names."""
        other = [
            f"{field} was given as {name}"
            for field, (name, _) in self._names.items()
            if field != name and str(error).startswith(field)
        ]
        return f"{error} ({'; '.join(other)})" if other else str(error)


def _query(
    prompt: str | Conversation, given: _Given, defaults: SamplingParams, tokenizer: Tokenizer
) -> Query:
    switches = given.of(SWITCHES)
    returns = {
        name.removeprefix(_RETURNS)
        for name, value in switches.items()
        if name.startswith(_RETURNS) and value
    }
    if "log_probs" in returns:  # TensorRT-LLM's name for two outputs
        returns = returns - {"log_probs"} | {"cum_log_probs", "output_log_probs"}
    chat, fields = isinstance(prompt, Conversation), {}
    max_tokens = defaults.max_tokens or (None if chat else DEFAULT_COMPLETION_TOKENS)
    sampling = {"max_tokens": max_tokens, **given.of(_FIELDS)}
    form = guided(given.of(GUIDES), tokenizer)
    if form is not None and "structured" in sampling:
        raise InvalidRequestError(
            f"structured and {GUIDE_TYPE} both say what the answer must look like; give one of them"
        )
    if form is not None:
        sampling["structured"] = form
        fields["structured"] = GUIDE
        given.call("structured", GUIDE)
    asked = sampling.get("logprobs", defaults.logprobs) is not None
    if not asked and returns & _FROM_LOGPROBS:
        sampling["logprobs"] = 0
    try:
        params = sampling_params(defaults, sampling)
    except InvalidRequestError as error:
        raise InvalidRequestError(given.explain(error)) from error
    stream = switches.get("stream", False)
    # As vLLM's backend: a single answer begins with the prompt, a stream does not.
    excluded = stream or switches.get("exclude_input_in_single_output", False)
    echo = not chat and not switches.get("exclude_input_in_output", excluded)
    if chat:  # answers are held to the schemas of tools, too
        fields = {"prompt": MESSAGES, "structured": "tools", **fields}
    return Query(prompt, params, stream, echo, frozenset(returns), asked, fields)


def _known() -> list[str]:
    return sorted({*_KNOWN, *SAMPLING, *WITHOUT_MEANING})


def _is_tritons(name: str, value: object, request_id: str) -> bool:
    """Whether Triton itself put a parameter there, or takes it."""
    return name.startswith("triton_") or (name == "id" and str(value) == request_id)


def _single(name: str, array: NDArray[Any]) -> Any:  # noqa: ANN401 - elements of many types
    if array.size != 1:
        raise InvalidRequestError(f"{name} has {array.size} elements; expected exactly one")
    return array.reshape(-1)[0]


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name} is not UTF-8 ({error}); send it as UTF-8") from error


def _sampling_input(name: str, array: NDArray[Any]) -> object:
    if SAMPLING[name].data_type == "TYPE_STRING":
        if array.size > MAX_TEXTS:
            raise InvalidRequestError(
                f"{name} has {array.size} elements; this server takes {MAX_TEXTS}"
            )
        # Clients of TensorRT-LLM send "" for no word at all.
        return [text for text in _texts(name, array.reshape(-1)) if text]
    value = _single(name, array)
    # The shortest decimal, which is what was written: 0.7 and not 0.699999988.
    return float(str(value)) if array.dtype == np.float32 else value.item()


def _texts(name: str, values: Iterable[bytes]) -> list[str]:
    return [_text(name, value) for value in values]


def _sampling_parameters(array: NDArray[Any]) -> Mapping[str, Any]:
    name = "sampling_parameters"
    raw = _single(name, array)
    if len(raw) > _MAX_JSON_BYTES:
        raise InvalidRequestError(
            f"{name} has {len(raw)} bytes; this server takes {_MAX_JSON_BYTES}"
        )
    text = _text(name, raw)
    values = _json(text) if text.strip() else {}
    if not isinstance(values, dict):
        raise InvalidRequestError(
            f'{name}={text!r:.200} is not a JSON object; write for example {{"temperature": 0.7}}'
        )
    return values


def _value(name: str, value: object) -> object:
    """The value of a parameter's field. One of a request is a number, a boolean or a text: text may
    hold the other types."""
    if name in SWITCHES:
        return _switch(name, value)
    if name in _LATER:
        return value
    if (SAMPLING[name].field if name in SAMPLING else name) in _TEXTS:
        return [value] if isinstance(value, str) else value
    parsed = _json(value) if isinstance(value, str) else None
    value = value if parsed is None else parsed
    return [value] if name == "end_id" else value


def _check_without_meaning(name: str, value: object) -> None:
    if name == "beam_width" and value not in (1, "1"):
        raise InvalidRequestError(
            f"beam_width={value!r:.80}: there is no beam search; send 1 or leave it out, and ask "
            "for several answers with num_return_sequences"
        )


def _json(text: str) -> object:
    """Decoded JSON, None if it is not JSON."""
    if len(text) > _MAX_JSON_BYTES:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _switch(name: str, value: object) -> bool:
    value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name}={value!r:.80} is not a boolean; send true or false")
    return value
