from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from tests.server.core.test_metrics import ENGINE

from slipstream.server.core.metrics import EngineState, Gathered


def test_pickers_find_vllms_gauges_beside_ours() -> None:
    state = EngineState(ENGINE.stats, ENGINE.config, None, None)
    text = Gathered(state, [], pid=1).text("m").decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}

    told = {name: family for name, family in families.items() if name.startswith("vllm:")}
    assert {name: family.samples[0].value for name, family in told.items()} == {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:cache_config_info": 1,
    }
    assert {family.type for family in told.values()} == {"gauge"}
    size = told["vllm:cache_config_info"].samples[0].labels
    assert (size["block_size"], size["num_gpu_blocks"]) == ("32", "24")
    assert families["slipstream:num_requests_waiting"].samples[0].value == 2
