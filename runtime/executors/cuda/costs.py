"""What steps of decodes take on a GPU, measured once and kept in the engine."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream.errors import EngineMismatchError
from slipstream.weights.json import Origin, read_fields

log = logging.getLogger(__name__)
_AGAIN = "tune the engine again, or delete the file and build it again"


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds on a GPU of the name ``device``: ``rows`` of a step of decodes without contexts, by
    how many rows it has; ``guesses`` of a head after one, by its sequences and how many tokens it
    guesses of each."""

    device: str
    rows: dict[int, float] = field(default_factory=dict)
    guesses: dict[tuple[int, int], float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The content of the engine's file."""
        guesses = [[*key, seconds] for key, seconds in sorted(self.guesses.items())]
        rows = sorted(self.rows.items())
        return json.dumps({"device": self.device, "rows": rows, "guesses": guesses}).encode()

    @classmethod
    def load(cls, file: Path, device: str) -> StepCosts | None:
        """What a file says, if there is one and it was measured on such a device.

        Raises EngineMismatchError for a file that says something else.
        """
        if not file.exists():
            return None
        origin = Origin(file, _AGAIN, EngineMismatchError)
        fields = read_fields(file, origin)
        if fields.text("device") != device:
            log.info(
                "%s was timed on %s, this is %s: not used", file, fields.text("device"), device
            )
            return None
        found: Any = fields.values
        try:
            rows = {int(count): float(seconds) for count, seconds in found["rows"]}
            guesses = {
                (int(sequences), int(count)): float(seconds)
                for sequences, count, seconds in found["guesses"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise origin.refusal(f"holds no costs of steps ({error!s:.100})") from error
        return cls(device, rows, guesses)
