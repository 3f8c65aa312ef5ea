"""What nvidia-modelopt is given; it need not be installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import save_tiny

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.modelopt_adapter import _model

BFLOAT16 = 0.03


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope-long"])
def test_the_model_computes_what_the_checkpoint_does(name: str, tmp_path: Path) -> None:
    """Scales of embeddings and rotary frequencies among it, which are no weights."""
    checkpoint = open_checkpoint(save_tiny(CONFIGS[name], tmp_path))
    window = np.arange(5, 45, dtype=np.int32)
    with torch.no_grad():
        found = _model(checkpoint)(torch.from_numpy(window.astype(np.int64))[None]).logits[0]
    (wanted,) = CheckpointModel(checkpoint).logits([window])
    error = np.linalg.norm(found.float().numpy() - wanted) / np.linalg.norm(wanted)
    assert error < BFLOAT16
