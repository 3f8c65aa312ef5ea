"""How many guesses of a proposer are right, where an engine continues the texts that ship."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.engine import open_engine
from slipstream.quantize.calibration_data import evaluation_windows
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.progress import item_progress

PROMPT, ANSWER, GUESSES = 128, 64, 4  # tokens
_BATCH = 8  # prompts


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What became of the guesses in answers of ``ANSWER`` tokens to ``prompts`` texts, greedily.

    ``drafts`` counts how often a sequence had some in a step, ``draft_tokens`` how many those were,
    ``by_position`` which part of the drafts had a right first token, a right second one, ...
    """

    proposer: str
    prompts: int
    window: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    by_position: tuple[float, ...]
    seconds: float

    @property
    def length(self) -> float:
        """Tokens that a step with drafts gives, in the mean: those accepted and one more."""
        return 1 + self.accepted_tokens / max(1, self.drafts)

    def describe(self) -> list[tuple[str, str]]:
        """For people."""
        shares = " ".join(f"{share:.1%}" for share in self.by_position)
        told = f"{self.prompts} prompts of up to {self.window} tokens, {ANSWER} tokens after each"
        return [
            ("text", told),
            ("drafts", f"{self.drafts} by {self.proposer}, {self.draft_tokens} tokens"),
            ("acceptance length", f"{self.length:.2f} tokens a step with drafts"),
            ("accepted by position", shares),
            ("time", f"{self.seconds:.1f} s"),
        ]

    def as_dict(self) -> dict[str, object]:
        """For programs."""
        return {
            "speculative": self.proposer,
            "prompts": self.prompts,
            "window": self.window,
            "num_drafts": self.drafts,
            "num_draft_tokens": self.draft_tokens,
            "num_accepted_tokens": self.accepted_tokens,
            "acceptance_length": self.length,
            "acceptance_by_position": list(self.by_position),
            "seconds": self.seconds,
        }


def measure_acceptance(
    engine: Path, text: Path | None, window: int | None, runtime: Mapping[str, Any]
) -> Acceptance:
    """Continue every window of a text; ``runtime`` names the proposer, and how many tokens it is to
    guess if not ``GUESSES``."""
    # Imported here, with the device's libraries behind it, so that bad usage is reported at once.
    from slipstream.runtime.llm import LLM

    start, options = time.perf_counter(), {"num_speculative_tokens": GUESSES, **runtime}
    longest = runtime.get("max_seq_len", open_engine(engine).manifest.limits.max_seq_len)
    limit = min(window or PROMPT, longest - ANSWER)
    with LLM(engine, **options) as llm:
        windows = evaluation_windows(llm.tokenizer.encode, text, limit)
        _continue(llm.generate, windows)
        found = llm.stats.speculation
    assert found is not None, "a proposer was asked for"
    shares = tuple(count / max(1, found.num_drafts) for count in found.accepted_per_position)
    return Acceptance(
        str(runtime["speculative"]),
        len(windows),
        limit,
        found.num_drafts,
        found.num_draft_tokens,
        found.num_accepted_tokens,
        shares,
        time.perf_counter() - start,
    )


def _continue(generate: Any, windows: Sequence[NDArray[np.int32]]) -> None:  # noqa: ANN401
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    with item_progress("guessing") as report:
        for first in range(0, len(windows), _BATCH):
            generate([window.tolist() for window in windows[first : first + _BATCH]], params)
            report(min(first + _BATCH, len(windows)), len(windows))
