"""Mixtures of experts on a CPU: no request depends on the routing of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import TINY_SHAPE, save_tiny

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.runtime.llm import LLM
from slipstream.runtime.sampling.params import SamplingParams

INT4 = {"quantization": "int4_wo", "group_size": 32}


@pytest.mark.parametrize(
    ("name", "options"),
    [("qwen2-moe", {}), ("qwen2-moe", INT4), ("granitemoeshared", INT4), ("glm4-moe-groups", INT4)],
    ids=str,
)
def test_tokens_are_the_same_alone_and_in_a_batch(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = save_tiny(CONFIGS[name], tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions(**options))
    rng = np.random.default_rng(0)
    lengths = (3, 40, 17, 1)
    prompts = [rng.integers(0, TINY_SHAPE["vocab_size"], n).tolist() for n in lengths]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = LLM(tmp_path / "engine", kv_cache_bytes=8 << 20, enable_prefix_caching=False)
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 1
