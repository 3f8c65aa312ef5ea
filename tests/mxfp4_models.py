"""A tiny gpt-oss whose experts are random blocks of MXFP4, and the same with dense experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SHAPE: dict[str, Any] = {
    **TINY_SHAPE,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 17,
}
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def save_mxfp4(directory: Path, **changes: Any) -> tuple[Path, Path]:  # noqa: ANN401
    """Two checkpoints, of ``SHAPE`` but for some changes: blocks and scales as gpt-oss ships them,
    and what transformers makes of them in float32."""
    dense = save_tiny(GptOssConfig(**SHAPE | changes), directory / "dense")
    tensors = load_file(dense / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 123, shape[:3], generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    packed = directory / "mxfp4"
    packed.mkdir()
    for file in dense.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (packed / "config.json").write_text(json.dumps(config))
    return packed, dense
