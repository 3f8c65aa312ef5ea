"""What an answer took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from slipstream.runtime.request import RequestMetrics, RequestOutput


@dataclass(slots=True)
class Usage:
    """Tokens of all prompts and completions of a request, and the times of the last that was seen,
    from outputs of kind ``delta`` or ``final``."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0  # of those generated
    metrics: RequestMetrics | None = None
    _seen: set[int] = field(default_factory=set)
    # Tokens of predictions that were verified, right and wrong, by the position of the prompt.
    _predicted: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, output: RequestOutput, position: int = 0) -> Self:
        """Take an output of the prompt at ``position`` into account."""
        self.add_prompt(output, position)
        for completion in output.outputs:
            self.generated += len(completion.token_ids)
        return self

    def add_prompt(self, output: RequestOutput, position: int) -> None:
        """The same without what it generated."""
        if position not in self._seen:
            self._seen.add(position)
            self.prompt += len(output.prompt_token_ids)
            self.cached += output.num_cached_tokens
        self.metrics = output.metrics
        verified = output.accepted_prediction_tokens, output.rejected_prediction_tokens
        if any(verified):
            self._predicted[position] = verified

    @property
    def accepted(self) -> int:
        """Tokens of the client's prediction that were verified and right."""
        return sum(right for right, _ in self._predicted.values())

    @property
    def rejected(self) -> int:
        """Tokens of the client's prediction that were verified and wrong."""
        return sum(wrong for _, wrong in self._predicted.values())

    def tokens(self) -> dict[str, int]:
        """Token counts, with OpenAI's names."""
        return {
            "prompt_tokens": self.prompt,
            "cached_tokens": self.cached,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
        }

    def timing(self) -> dict[str, float | None]:
        """Seconds to the first token and in all, and tokens per second after the first."""
        first = self._since_arrival("first_token_time")
        total = self._since_arrival("finished_time")
        rate = None
        if first is not None and total is not None and self.generated > 1 and total > first:
            rate = (self.generated - 1) / (total - first)
        return {"time_to_first_token": first, "total_time": total, "tokens_per_second": rate}

    def describe(self) -> str:
        """One line."""
        times = self.timing()
        first, rate = times["time_to_first_token"], times["tokens_per_second"]
        words = [
            f"prompt {self.prompt} tokens ({self.cached} cached)",
            f"answer {self.generated} tokens",
        ]
        if first is not None:
            words.append(f"first after {first * 1000:.0f} ms")
        if rate is not None:
            words.append(f"then {rate:.1f} tokens/s")
        return ", ".join(words)

    def _since_arrival(self, event: str) -> float | None:
        if self.metrics is None:
            return None
        time: float | None = getattr(self.metrics, event)
        return None if time is None else time - self.metrics.arrival_time
