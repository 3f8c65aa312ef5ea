"""What is asked of an engine beside another: the same requests, whoever answers them.

Decode: 128 tokens in, 256 out, ms a token from the difference to a run of one token. Prefill: one
prompt, one new token. Throughput: all requests at once, output tokens a second. Contexts: ms a
token behind prompts that were computed before, so that only decodes are timed. Lognormal: a
thousand requests at once, whose lengths are drawn. Prefixes: requests that share eight of them,
none of which is known before. Sampled: ms a token of 64 rows that all ask for the same. Prompts are
random tokens, no two of which are alike unless that is said; answers are greedy, of full length.
Whoever imports this needs nothing else.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Sampling = Mapping[str, Any]
Figures = Iterator[tuple[str, float]]

# By the names that Slipstream and vLLM share.
SAMPLED: dict[str, Sampling] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_p_top_k": {"temperature": 1.0, "top_p": 0.9, "top_k": 50},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logprobs": {"logprobs": 5},
}
CONTEXTS = ((8192, 1), (8192, 16), (32768, 1), (32768, 8))  # tokens, requests
LONGEST = 32768 + 256  # tokens of a sequence
_REQUESTS = 1000
# Medians of the lognormal lengths in and out, their widths, and the longest.
_INPUT, _OUTPUT = (256, 1.0, 4096), (160, 0.7, 1024)
_PREFIXES, _PREFIX_TOKENS = 8, 2000
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt of token ids, how many tokens are wanted after it, whichever those are, and what is
    asked of sampling: the likeliest if nothing."""

    prompt: list[int]
    output_len: int
    sampling: Sampling = field(default_factory=dict)


Seconds = Callable[[list[Ask]], float]


class Loads:
    """Measures of whoever takes so many ``seconds`` for requests that come at once."""

    def __init__(self, seconds: Seconds, vocab_size: int) -> None:
        self._seconds = seconds
        self._vocab_size = vocab_size
        self._random = random.Random(0)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random tokens."""
        return [self._random.choices(range(self._vocab_size), k=length) for _ in range(count)]

    def seconds(self, count: int, input_len: int, output_len: int) -> float:
        """Of so many requests of one size."""
        return self._run(self.prompts(count, input_len), output_len)

    def warm_up(self) -> None:
        """Let whatever is first needed then be there."""
        for count, length in ((1, 128), (64, 128), (8, 2048)):
            self.seconds(count, length, 8)

    def decode_ms(self, batch: int) -> float:
        """A token of so many requests takes this long."""
        self.seconds(batch, 128, 8)
        pairs = [
            (self.seconds(batch, 128, 256) - self.seconds(batch, 128, 1)) / 255
            for _ in range(_ROUNDS)
        ]
        return statistics.median(pairs) * 1e3

    def decode(self) -> Figures:
        """Batches of 1, 16 and 64."""
        for batch in (1, 16, 64):
            yield f"decode_{batch}", self.decode_ms(batch)

    def prefill(self) -> Figures:
        """ms to the first token of 2,048 and 8,192."""
        for length in (2048, 8192):
            yield f"prefill_{length}", self._first_ms(length, 5)

    def long_prefill(self) -> Figures:
        """ms to the first token of 32,768."""
        yield "prefill_32768", self._first_ms(32768, _ROUNDS)

    def _first_ms(self, length: int, rounds: int) -> float:
        self.seconds(1, length, 1)
        return statistics.median(self.seconds(1, length, 1) for _ in range(rounds)) * 1e3

    def throughput(self) -> Figures:
        """Output tokens a second of many requests that come at once."""
        for count, input_len, output_len in ((512, 512, 256), (256, 2048, 128)):
            seconds = self.seconds(count, input_len, output_len)
            yield f"throughput_{input_len}_{output_len}", count * output_len / seconds

    def contexts(self) -> Figures:
        """ms a token behind long prompts."""
        for length, count in CONTEXTS:
            yield f"context_{length}_{count}", self._token_ms(self.prompts(count, length), 64)

    def sampled(self) -> Figures:
        """ms a token of 64 rows, by what they ask for."""
        for name, sampling in SAMPLED.items():
            yield f"sampled_{name}", self._token_ms(self.prompts(64, 128), 128, sampling)

    def _token_ms(
        self, prompts: list[list[int]], tokens: int, sampling: Sampling | None = None
    ) -> float:
        """A token of all prompts; where prefixes are kept, their own time is not that of a run."""
        self._run(prompts, 1, sampling)
        pairs = [
            (self._run(prompts, tokens + 1, sampling) - self._run(prompts, 1, sampling)) / tokens
            for _ in range(_ROUNDS)
        ]
        return statistics.median(pairs) * 1e3

    def lognormal(self) -> Figures:
        """Output tokens a second of a thousand requests of lengths that are drawn."""
        asks = list(lognormal_asks(self.prompts))
        seconds = self._seconds(asks)
        yield "lognormal", sum(ask.output_len for ask in asks) / seconds

    def prefixes(self) -> Figures:
        """Output tokens a second of 256 requests that share prefixes, twice, with others."""
        for name in ("prefixes", "prefixes_again"):
            shared = self.prompts(_PREFIXES, _PREFIX_TOKENS)
            own = self.prompts(256, 100)
            seconds = self._run([shared[i % _PREFIXES] + each for i, each in enumerate(own)], 100)
            yield name, 256 * 100 / seconds

    def _run(
        self, prompts: Iterable[list[int]], output_len: int, sampling: Sampling | None = None
    ) -> float:
        return self._seconds([Ask(prompt, output_len, sampling or {}) for prompt in prompts])


def lognormal_asks(prompts: Callable[[int, int], list[list[int]]]) -> Iterator[Ask]:
    """The same lengths each time."""
    drawn = random.Random(1)

    def length(median: float, width: float, most: int) -> int:
        return max(1, min(most, round(median * drawn.lognormvariate(0, width))))

    for _ in range(_REQUESTS):
        size, output_len = length(*_INPUT), length(*_OUTPUT)
        yield Ask(prompts(1, size)[0], output_len)


# By name; in the order of their worth where there is little time.
LOADS: dict[str, Callable[[Loads], Figures]] = {
    "contexts": Loads.contexts,
    "long_prefill": Loads.long_prefill,
    "lognormal": Loads.lognormal,
    "prefixes": Loads.prefixes,
    "sampled": Loads.sampled,
    "throughput": Loads.throughput,
    "decode": Loads.decode,
    "prefill": Loads.prefill,
}
