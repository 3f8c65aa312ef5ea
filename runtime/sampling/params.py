"""What a caller may ask of sampling, with vLLM's names, validated on construction.

Every default is written here and nowhere else: the command line, the servers and the documentation
read them from ``SamplingParams``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.sampling.parameter_checks import (
    Number,
    check_flag,
    check_logit_bias,
    check_numbers,
    check_strings,
    check_token_ids,
    check_token_sequences,
)
from slipstream.runtime.structured.output import StructuredOutput

# Below this the division by the temperature only magnifies rounding, so the most likely token is
# taken.
GREEDY_TEMPERATURE = 1e-5

RANDOM_SEED = -1  # what many clients send for none

# What each numeric parameter may be.
NUMBERS = {
    "n": Number(int, 1, 16384, remedy="use 1 for one completion"),
    "max_tokens": Number(int, 1, optional=True, remedy="leave it out to use all the room left"),
    "min_tokens": Number(int, 0, remedy="use 0 for no minimum"),
    "temperature": Number(
        float, 0, 1000, remedy="use 0 for greedy decoding, about 0.7 for variety"
    ),
    "top_k": Number(int, -1, remedy="use 0 or -1 to keep all tokens"),
    "top_p": Number(float, 0, 1, remedy="use 1 to keep all tokens"),
    "min_p": Number(float, 0, 1, remedy="use 0 to switch it off"),
    "repetition_penalty": Number(
        # Beyond, and with a logit of some size, float32 ends.
        float,
        1e-3,
        1000,
        remedy="use 1 to switch it off, about 1.1 against repetition",
    ),
    "presence_penalty": Number(float, -2, 2, remedy="use 0 to switch it off"),
    "frequency_penalty": Number(float, -2, 2, remedy="use 0 to switch it off"),
    "seed": Number(
        int, -(2**63), 2**64 - 1, optional=True, remedy="leave it out for a random seed"
    ),
    "logprobs": Number(int, -1, optional=True, remedy="leave it out for none, -1 for all tokens"),
    "prompt_logprobs": Number(
        int, -1, optional=True, remedy="leave it out for none, -1 for all tokens"
    ),
}
_TOKEN_ID = re.compile(r"\d{1,10}")  # Python reads no number of thousands of digits
# What ``chat``, ``generate`` and the page use where neither request nor model says anything: the
# raw distribution, which OpenAI's interface has by default, lets small models lose the thread.
INTERACTIVE: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05}
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "speculative")
_FROM_GENERATION_CONFIG = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to turn logits into a completion; raises ``InvalidRequestError`` on an impossible value.

    Names and meanings are vLLM's, except that ``max_tokens=None`` means "until the engine's length
    is reached".

    n: completions of one prompt.
    max_tokens, min_tokens: bounds on generated tokens; end-of-sequence, stop tokens and stop
        strings are not seen before ``min_tokens``.
    temperature: divides the logits; below 1e-5 the most likely token is taken and the next three
    are ignored.
    top_k: keep the k most likely tokens and those equal to the k-th (0 or -1: all).
    top_p: keep the smallest set of most likely tokens whose mass reaches p; at 0 the most likely
    token is taken.
    min_p: keep tokens at least this many times as likely as the most likely one.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or
    the output.
    presence_penalty, frequency_penalty: subtracted from logits of output tokens, once / for each
    occurrence.
    seed: makes the completion reproducible, whatever else is in the batch; of ``n`` completions the
    first, and the others by seeds that are mixed of it and their index. -1 is a random one, as for
    vLLM and llama.cpp, and other negative ones are those of the same 64 bits.
    stop: a string or several that end the completion; cut from the text unless
    ``include_stop_str_in_output``.
    stop_token_ids: tokens that end the completion, beside the model's own end-of-sequence tokens.
    ignore_eos: go on after the model's end-of-sequence tokens.
    logit_bias: ``{token id: value in [-100, 100]}`` added to the logits.
    allowed_token_ids: only these tokens can be generated.
    bad_words: strings that must not be generated; ``resolve`` turns them into
    ``bad_words_token_ids``.
    bad_words_token_ids: token sequences that must not be generated.
    logprobs, prompt_logprobs: how many of the most likely tokens to report with their log
        probability at each position, beside the token itself (0: only the token itself, -1: all,
        None: nothing).
    logprob_token_ids: the tokens to report at each generated position in place of the likeliest;
        ``logprobs`` is then 0.
    skip_special_tokens: leave special tokens out of the text.
    shown_special_tokens: special tokens that stay in the text nevertheless, such as those that mark
    calls of tools.
    structured: the form that the completion must have; it ends when the form is complete. Where
        the form leaves nothing that ``min_tokens``, ``bad_words`` and ``allowed_token_ids`` permit,
        it is the form that holds, and its end is one with ``ignore_eos`` too.
    speculative: whether tokens may be guessed and verified, where the engine does so; that changes
        how fast they come and nothing else.
    prediction: a text that the completion is expected to resemble, to guess from; ``resolve`` turns
        it into ``prediction_token_ids``.
    prediction_token_ids: the same as tokens.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    shown_special_tokens: Sequence[str] = ()
    structured: StructuredOutput | None = None
    speculative: bool = True
    prediction: str = ""
    prediction_token_ids: Sequence[int] = ()

    # Derived once, because the sampler asks for every row of every step.
    greedy: bool = field(init=False, repr=False, compare=False)
    penalizes: bool = field(init=False, repr=False, compare=False)
    edits_logits: bool = field(init=False, repr=False, compare=False)
    # Whether what may come next depends on the very token before, which the host must know then.
    needs_output: bool = field(init=False, repr=False, compare=False)
    # Whether the first of the largest logits is the token, and all that is told of it.
    plain: bool = field(init=False, repr=False, compare=False)
    # Whether what is forbidden changes from token to token.
    bans_change: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate, and turn sequences into tuples."""
        check_numbers(self, NUMBERS)
        if self.seed is not None and self.seed < 0:
            self._set(seed=None if self.seed == RANDOM_SEED else self.seed % 2**64)
        if not isinstance(self.prediction, str):
            raise InvalidRequestError(
                f"prediction is a {type(self.prediction).__name__}; it must be a text",
                param="prediction",
            )
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        self._set(
            stop=check_strings("stop", self.stop),
            bad_words=check_strings("bad_words", self.bad_words),
            shown_special_tokens=check_strings("shown_special_tokens", self.shown_special_tokens),
            stop_token_ids=check_token_ids("stop_token_ids", self.stop_token_ids),
            prediction_token_ids=check_token_ids("prediction_token_ids", self.prediction_token_ids),
            bad_words_token_ids=check_token_sequences(
                "bad_words_token_ids", self.bad_words_token_ids
            ),
        )
        if isinstance(self.structured, Mapping):  # as decoded JSON has it
            self._set(structured=StructuredOutput.from_dict(self.structured))
        if self.allowed_token_ids is not None:
            allowed = check_token_ids(
                "allowed_token_ids",
                self.allowed_token_ids,
                empty_remedy="leave it out to allow all tokens",
            )
            self._set(allowed_token_ids=tuple(dict.fromkeys(allowed)))
        if self.logprob_token_ids is not None:
            listed = check_token_ids(
                "logprob_token_ids",
                self.logprob_token_ids,
                empty_remedy="leave it out, and say how many of the likeliest with logprobs",
            )
            self._set(logprob_token_ids=tuple(dict.fromkeys(listed)), logprobs=0)
        if self.logit_bias is not None:
            self._set(logit_bias=check_logit_bias(self.logit_bias))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                f"lower min_tokens to at most {self.max_tokens}, or raise max_tokens",
                param="min_tokens",
            )
        self._derive()

    def _set(self, **values: Any) -> None:  # noqa: ANN401 - fields have many types
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _derive(self) -> None:
        penalizes = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (
            1,
            0,
            0,
        )
        long_words = any(len(word) > 1 for word in self.bad_words_token_ids)
        greedy = self.temperature < GREEDY_TEMPERATURE or self.top_p == 0
        edits_logits = (
            penalizes
            or bool(self.logit_bias or self.bad_words_token_ids or self.structured)
            or self.allowed_token_ids is not None
        )
        self._set(
            greedy=greedy,
            penalizes=penalizes,
            edits_logits=edits_logits,
            plain=greedy and not (edits_logits or self.min_tokens) and self.logprobs is None,
            needs_output=long_words or self.structured is not None,
            bans_change=long_words or self.min_tokens > 0,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from decoded JSON, where null means the default; unknown names are refused."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise InvalidRequestError(
                f"unknown sampling parameter {', '.join(map(repr, unknown))}; "
                f"known are {', '.join(known)}",
                param=unknown[0],
            )
        given = {name: value for name, value in values.items() if value is not None}
        if isinstance(bias := given.get("logit_bias"), Mapping):
            # JSON objects have string keys.
            given["logit_bias"] = {
                int(k) if isinstance(k, str) and _TOKEN_ID.fullmatch(k) else k: v
                for k, v in bias.items()
            }
        return cls(**given)

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], otherwise: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Build from the defaults in a model's ``generation_config.json``; ``otherwise`` has the
        values of fields that it does not name.

        Reads what vLLM reads: temperature, top_k, top_p, min_p, repetition_penalty and
        max_new_tokens.
        """
        recommended = {
            ours: config[theirs]
            for theirs, ours in _FROM_GENERATION_CONFIG.items()
            if config.get(theirs) is not None
        }
        return cls.from_dict({**(otherwise or {}), **recommended})

    def resolve(
        self, vocab_size: int, encode: Callable[[str], Sequence[int]] | None = None
    ) -> SamplingParams:
        """Check token ids against the model and turn ``bad_words`` into token sequences.

        ``vocab_size`` is the width of the model's logits. ``encode`` turns text into token ids
        without special tokens; it is needed only with ``bad_words``. A word is banned both at the
        start of a text and after a space. Raises ``InvalidRequestError``.
        """
        self._check_vocabulary(vocab_size)
        text_fields = [name for name in ("bad_words", "prediction") if getattr(self, name)]
        if not text_fields:
            return self
        if encode is None:
            raise InvalidRequestError(
                f"{text_fields[0]} need a tokenizer, and this engine has none; "
                f"send {text_fields[0]}_token_ids instead",
                param=text_fields[0],
            )
        predicted = tuple(encode(self.prediction)) if self.prediction else self.prediction_token_ids
        sequences = dict.fromkeys(tuple(ids) for ids in self.bad_words_token_ids)
        for word in self.bad_words:
            for text in (word, " " + word.lstrip()):
                if ids := tuple(encode(text)):
                    sequences[ids] = None
        resolved = dataclasses.replace(
            self,
            bad_words=(),
            bad_words_token_ids=tuple(sequences),
            prediction="",
            prediction_token_ids=predicted,
        )
        resolved._check_vocabulary(vocab_size)
        return resolved

    def _check_vocabulary(self, vocab_size: int) -> None:
        groups: dict[str, Sequence[int]] = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logprob_token_ids": self.logprob_token_ids or (),
            "logit_bias": tuple(self.logit_bias or ()),
            "prediction_token_ids": self.prediction_token_ids,
            "bad_words_token_ids": [i for ids in self.bad_words_token_ids for i in ids],
        }
        for name, ids in groups.items():
            if ids and max(ids) >= vocab_size:
                raise InvalidRequestError(
                    f"{name} holds token {max(ids)}, but this model's tokens go from 0 to "
                    f"{vocab_size - 1}; use ids of this model's tokenizer",
                    param=name,
                )
