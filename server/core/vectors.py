"""Vectors in answers: how many numbers, and how they are written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slipstream.server.core.limits import MAX_NUMBERS
from slipstream.server.core.refusal import Refusal


def check_numbers(numbers: int) -> None:
    """Raise ``Refusal`` for more numbers in all vectors of an answer than one request takes."""
    if numbers > MAX_NUMBERS:
        raise Refusal(
            "invalid",
            f"the answer would hold {numbers} numbers; one request takes {MAX_NUMBERS}. Lower "
            "dimensions, or send several requests",
            param="input",
        )


def vector_json(vector: NDArray[np.float32]) -> str:
    """A list with as many digits as tell one float32 from its neighbours."""
    return f"[{','.join(map('{:.9g}'.format, vector.tolist()))}]"
