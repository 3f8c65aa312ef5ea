"""What an engine costs on this CPU beside tokens/s: start-up, memory, time outside the session.

    python benchmarks/cpu_engine.py ENGINE --json benchmarks/results/cpu_engine.json

Each figure comes from a fresh process; start-up is the median of five.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpu_peers import cpu_name

STARTS = 5


def start_up(engine: str) -> dict[str, float]:
    """Seconds from nothing imported to the first token of a 16-token prompt."""
    start = time.perf_counter()
    from slipstream import LLM, SamplingParams

    llm = LLM(engine)
    loaded = time.perf_counter()
    llm.generate([[5] * 16], SamplingParams(temperature=0, max_tokens=1))
    return {
        "import_and_load_s": loaded - start,
        "import_to_first_token_s": time.perf_counter() - start,
    }


def memory(engine: str) -> dict[str, float]:
    """MB resident after a 512-token prompt, beside the engine's weights and the pages in use."""
    from slipstream import LLM, SamplingParams
    from slipstream.builder.contract import bytes_per_token
    from slipstream.builder.engine import WEIGHTS, open_engine

    llm = LLM(engine)
    llm.generate([[5, 6] * 256], SamplingParams(temperature=0, max_tokens=16))
    status = Path("/proc/self/smaps_rollup").read_text().split()
    resident = int(status[status.index("Rss:") + 1]) * 1024
    weights = (Path(engine) / WEIGHTS).stat().st_size
    pages = bytes_per_token(open_engine(Path(engine)).manifest.caches) * 528
    sizes = {"resident": resident, "weights": weights, "kv_in_use": pages}
    sizes["beyond_weights_and_kv"] = resident - weights - pages
    return {f"{name}_mb": size / 1e6 for name, size in sizes.items()}


def outside(engine: str) -> dict[str, float]:
    """Milliseconds a step between two runs of the session, sampling included: 1 and 32 requests."""
    result = {}
    for requests in (1, 32):
        steps = _timed_steps(engine, requests)
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(steps)]
        runs = [end - start for start, end in steps]
        result[f"outside_session_{requests}_ms"] = statistics.median(gaps) * 1e3
        result[f"session_{requests}_ms"] = statistics.median(runs) * 1e3
    return result


def _timed_steps(engine: str, requests: int) -> list[tuple[float, float]]:
    """Start and end of every decode step's session run."""
    import onnxruntime as ort

    from slipstream import LLM, SamplingParams

    steps: list[tuple[float, float]] = []
    run: Callable[..., Any] = ort.InferenceSession.run_with_iobinding

    def timed(session: Any, binding: Any) -> None:  # noqa: ANN401 - onnxruntime is untyped
        start = time.perf_counter()
        run(session, binding)
        steps.append((start, time.perf_counter()))

    ort.InferenceSession.run_with_iobinding = timed
    try:
        llm = LLM(engine, enable_prefix_caching=False)
        params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
        llm.generate([[7, 8, 9 + i] * 10 for i in range(requests)], params)
    finally:
        ort.InferenceSession.run_with_iobinding = run
    return steps[-120:]


MEASURES = {"start_up": start_up, "memory": memory, "outside": outside}


def in_fresh_process(measure: str, engine: str) -> dict[str, float]:
    """The figures of one measure, from a process that has done nothing else."""
    command = [sys.executable, __file__, engine, "--only", measure]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=MEASURES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(MEASURES[arguments.only](arguments.engine)))
        return
    starts = [in_fresh_process("start_up", arguments.engine) for _ in range(STARTS)]
    figures = {name: statistics.median(s[name] for s in starts) for name in starts[0]}
    figures |= in_fresh_process("memory", arguments.engine)
    figures |= in_fresh_process("outside", arguments.engine)
    for name, value in figures.items():
        print(f"{name:32}{value:10.3f}")
    if arguments.json:
        facts = {"cpu": cpu_name(), "onnxruntime": version("onnxruntime"), **figures}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
