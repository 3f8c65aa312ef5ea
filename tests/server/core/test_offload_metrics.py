from __future__ import annotations

from dataclasses import replace

from tests.server.core.test_metrics import STATS, Engine

from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.stats import Traffic
from slipstream.server.core.http_metrics import HttpTally
from slipstream.server.core.metrics import EngineState, Gathered, Tally


def text(config: RuntimeConfig) -> str:
    stats = replace(
        STATS, host_queries=60, host_hits=32, stored=Traffic(10, 0.5), loaded=Traffic(20, 0.25)
    )
    engine = Engine(stats, config)
    state = EngineState(engine.stats, engine.config, engine.unhealthy, engine.closed)
    return Gathered(state, [(Tally(), HttpTally())], 1).text("m").decode()


def test_pages_on_the_host_are_counted_where_there_are_some() -> None:
    lines = text(RuntimeConfig(kv_offload_gib=1.0)).splitlines()
    for name, value in {
        'external_prefix_cache_queries_total{model_name="m"}': "60.0",
        'external_prefix_cache_hits_total{model_name="m"}': "32.0",
        'kv_offload_total_bytes_total{model_name="m",transfer_type="GPU_to_CPU"}': "10.0",
        'kv_offload_total_bytes_total{model_name="m",transfer_type="CPU_to_GPU"}': "20.0",
        'kv_offload_total_time_total{model_name="m",transfer_type="GPU_to_CPU"}': "0.5",
        'kv_offload_total_time_total{model_name="m",transfer_type="CPU_to_GPU"}': "0.25",
    }.items():
        assert f"slipstream:{name} {value}" in lines
    assert "kv_offload" not in text(RuntimeConfig())
