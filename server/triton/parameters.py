"""From what a client sent to a checked request.

Sampling parameters come as inputs (``temperature``), as JSON in the input ``sampling_parameters``,
or as parameters of the request, which is where ``/generate`` puts every key that is no input. What
is not known, or is said twice, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import InvalidRequestError
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.sampling import FIELDS, sampling_params
from slipstream.server.triton.interface import SAMPLING, SWITCHES

Inputs = Mapping[str, NDArray[Any]]

# No output tells log probabilities of the prompt.
_FIELDS = FIELDS - {"prompt_logprobs"}
# The fields that are text themselves, so that text is not read as JSON.
_TEXTS = frozenset({"stop", "bad_words"})
_RETURNS = "return_"


@dataclass(frozen=True, slots=True)
class Query:
    """A checked request: what to continue, how, and what to tell of it.

    ``returns`` names outputs beside ``text_output``. ``echo``: the text begins with the prompt.
    """

    prompt: str
    params: SamplingParams
    stream: bool
    echo: bool
    returns: frozenset[str]


def read_query(
    inputs: Inputs, parameters: Mapping[str, Any], defaults: SamplingParams, request_id: str = ""
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
    if "sampling_parameters" in inputs:
        for name, value in _sampling_parameters(inputs["sampling_parameters"]).items():
            given.add(name, value, "one of sampling_parameters")
    for name, value in parameters.items():
        if not _is_tritons(name, value, request_id):
            given.add(name, value, "a parameter of the request")
    return _query(_text("text_input", _single("text_input", inputs["text_input"])), given, defaults)


class _Given:
    """What was given, by field, and under which name."""

    def __init__(self) -> None:
        self.switches: dict[str, Any] = {}
        self.sampling: dict[str, Any] = {}
        self._names: dict[str, tuple[str, str]] = {}

    def add(self, name: str, value: object, how: str) -> None:
        """Take a value under the name that the client used; null is as if it were not there."""
        if value is None:
            return
        field = SAMPLING[name].field if name in SAMPLING else name
        assert field is not None
        if field not in _FIELDS and field not in SWITCHES:
            raise InvalidRequestError(
                f"unknown parameter {name!r}, given as {how}; known are {', '.join(_known())}"
            )
        if field in self._names:
            first, way = self._names[field]
            raise InvalidRequestError(
                f"{name} is given twice: as {way} and as {how}; give it once"
                if name == first
                else f"{first} (given as {way}) and {name} (given as {how}) are the same parameter;"
                " give one of them"
            )
        self._names[field] = (name, how)
        if field in SWITCHES:
            self.switches[field] = _switch(name, value)
        else:
            self.sampling[field] = _from_text(field, value)

    def explain(self, error: InvalidRequestError) -> str:
        """An error of sampling parameters in the client's own names."""
        other = [
            f"{field} was given as {name}"
            for field, (name, _) in self._names.items()
            if field != name and str(error).startswith(field)
        ]
        return f"{error} ({'; '.join(other)})" if other else str(error)


def _query(prompt: str, given: _Given, defaults: SamplingParams) -> Query:
    switches = given.switches
    returns = {
        name.removeprefix(_RETURNS)
        for name, value in switches.items()
        if name.startswith(_RETURNS) and value
    }
    sampling = given.sampling
    if returns & {"logprobs", "cumulative_logprob"}:
        sampling = {"logprobs": defaults.logprobs or 0, **sampling}
    try:
        params = sampling_params(defaults, sampling)
    except InvalidRequestError as error:
        raise InvalidRequestError(given.explain(error)) from error
    stream = switches.get("stream", False)
    # As vLLM's backend: a single answer begins with the prompt, a stream does not.
    echo = not switches.get("exclude_input_in_output", stream)
    return Query(prompt, params, stream, echo, frozenset(returns))


def _known() -> list[str]:
    return sorted({*_FIELDS, *SAMPLING, *SWITCHES})


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
        # Clients of TensorRT-LLM send "" for no word at all.
        return [text for text in _texts(name, array.reshape(-1)) if text]
    value = _single(name, array)
    # The shortest decimal, which is what was written: 0.7 and not 0.699999988.
    return float(str(value)) if array.dtype == np.float32 else value.item()


def _texts(name: str, values: Iterable[bytes]) -> list[str]:
    return [_text(name, value) for value in values]


def _sampling_parameters(array: NDArray[Any]) -> Mapping[str, Any]:
    name = "sampling_parameters"
    text = _text(name, _single(name, array))
    values = _json(text) if text.strip() else {}
    if not isinstance(values, dict):
        raise InvalidRequestError(
            f'{name}={text!r:.200} is not a JSON object; write for example {{"temperature": 0.7}}'
        )
    return values


def _from_text(field: str, value: object) -> object:
    """A parameter of a request is a number, a boolean or a text: text may hold the other types."""
    if not isinstance(value, str) or field in _TEXTS:
        return value
    parsed = _json(value)
    return value if parsed is None else parsed


def _json(text: str) -> object:
    """Decoded JSON, None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _switch(name: str, value: object) -> bool:
    value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name}={value!r:.80} is not a boolean; send true or false")
    return value
