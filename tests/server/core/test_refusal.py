from __future__ import annotations

import pytest

from slipstream.errors import (
    CapacityError,
    CheckpointError,
    ExecutionError,
    InvalidRequestError,
    SlipstreamError,
)
from slipstream.server.core.refusal import Kind, Refusal, refusal_of


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError("x"), "invalid"),
        (CapacityError("x"), "invalid"),
        (ExecutionError("x"), "failed"),
        (CheckpointError("x"), "internal"),
    ],
)
def test_an_error_of_the_engine_is_a_refusal_with_its_words(
    error: SlipstreamError, kind: Kind
) -> None:
    refusal = refusal_of(error)
    assert (refusal.kind, refusal.message, refusal.retry_after) == (kind, "x", None)


def test_a_refusal_stays_what_it_is() -> None:
    refusal = Refusal("busy", "later", code="queue_full", retry_after=3)
    assert refusal_of(refusal) is refusal and str(refusal) == "later"
