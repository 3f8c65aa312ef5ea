from __future__ import annotations

import pytest
from tests.server.openai.serving import samples_of

from slipstream.errors import InvalidRequestError
from slipstream.runtime.handover.stats import HandoverStats, Way
from slipstream.server.core.metrics import registry_of, render
from slipstream.server.dynamo.handover_metrics import HandoverMetrics
from slipstream.server.dynamo.options import DynamoOptions


def test_what_was_handed_over_is_counted_by_way_and_reason() -> None:
    stats = HandoverStats(sent=Way(3, 400, 0.5), expired=2)
    stats.lost["missing"] += 1
    samples = samples_of(render(registry_of(HandoverMetrics("m", stats, "p:"))).decode())
    told = {name: value for name, value in samples.items() if name.startswith("p:")}
    assert {name.split("_total")[0]: value for name, value in told.items() if value} == {
        "p:kv_transfers": 3,
        "p:kv_transfer_bytes": 400,
        "p:kv_transfer_seconds": 0.5,
        "p:kv_transfers_lost": 1,
        "p:kv_transfers_expired": 2,
    }


def test_a_worker_is_called_by_what_it_does() -> None:
    assert DynamoOptions().component_name == "backend" and not DynamoOptions().hands_over
    prefill = DynamoOptions(disaggregation_mode="prefill")
    assert prefill.component_name == "prefill" and prefill.hands_over
    assert DynamoOptions(disaggregation_mode="decode").component_name == "backend"
    assert DynamoOptions(disaggregation_mode="prefill", component="mine").component_name == "mine"
    for name in ("kv_transfer_gib", "kv_transfer_timeout"):
        with pytest.raises(InvalidRequestError, match=f"{name} is 0"):
            DynamoOptions(**{name: 0.0})  # type: ignore[arg-type]
