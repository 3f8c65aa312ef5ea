"""Tiny random models on disk, for tests that compare with transformers or just need an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from slipstream.builder.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
Arrays = dict[str, NDArray[Any]]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def save_tiny(config: PreTrainedConfig, directory: Path, seed: int = 0) -> Path:
    """Write a random model of a transformers configuration, with the tiny tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights and biases start as ones and zeros, which would hide a mix-up between
            # them.
            if parameter.ndim == 1 or name.endswith("bias"):  # those of experts have two axes
                parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.5))
            else:
                parameter.mul_(3)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # which is stored, and starts as one, too
                buffer.add_(torch.randn_like(buffer) * 0.2)
            # Corrections of routers, which start as zeros; the first expert is never the best.
            if "correction" in name:
                buffer.add_(torch.randn_like(buffer) * 0.1)
                buffer[0] = -10
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory)
    return directory


def calm(checkpoint: Path) -> Path:
    """Let normed queries be a tenth of what they are, and return the checkpoint.

    Of a model whose scores are products of normed queries and keys without a scale, as Gemma 4's
    are, ``save_tiny`` makes heads that attend to one key each, and bfloat16 is enough to change
    which: of transformers it changes a difference of two log probabilities by 0.3 in the median and
    1.3 at most from float32, of our kernels on a GPU as much, with one row a step or eight, and by
    1.1 from one to eight. So it is by 0.02 and 0.1, and by 0.07 from one to eight.
    """
    file = checkpoint / "model.safetensors"
    arrays = load_file(file)
    for name in arrays:
        if name.endswith("q_norm.weight"):
            arrays[name] = arrays[name] / np.float32(10)
    save_file(arrays, file, metadata={"format": "pt"})
    return checkpoint


def write_tiny_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of at most 320 tokens, ids 0 and 1 being ChatML's markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_SHAPE["vocab_size"],
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and the cat sat on the mat"], trainer
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def llama_tensors(**changes: Any) -> Arrays:  # noqa: ANN401 - keys of config.json
    """Random weights of ``LLAMA`` with these changes; they repeat, to be made quickly."""
    config = ModelConfig.from_huggingface({**LLAMA, **changes})
    noise = np.random.default_rng(0).normal(0, 0.1, 100_003).astype(np.float32)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        names += [f"{prefix}self_attn.{x}_proj.weight" for x in "qkvo"]
        names += [f"{prefix}mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
        names += [f"{prefix}{x}_layernorm.weight" for x in ("input", "post_attention")]
    return {name: np.resize(noise, config.weight_shape(name) or ()) for name in names}


def save_llama(directory: Path, arrays: Arrays, **changes: Any) -> Path:  # noqa: ANN401
    """Write a checkpoint of these weights and ``LLAMA`` with these changes."""
    directory.mkdir(exist_ok=True)
    save_file(arrays, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    write_tiny_tokenizer(directory)
    return directory
