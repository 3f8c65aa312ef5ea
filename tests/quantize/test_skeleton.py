"""How many threads the layers of a quantization take."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import LLAMA

from slipstream.builder.models.config import ModelConfig
from slipstream.quantize import skeleton


@pytest.mark.parametrize(("asked", "cores", "taken"), [(1, 8, 1), (2, 1, 1)])
def test_threads_are_those_asked_for_and_no_more_than_cores(
    asked: int, cores: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(skeleton, "usable_cores", lambda: cores)
    try:
        torch.set_num_threads(asked)  # as OMP_NUM_THREADS does
        skeleton.Skeleton(ModelConfig.from_huggingface(LLAMA))
        assert torch.get_num_threads() == taken
    finally:
        torch.set_num_threads(before)
