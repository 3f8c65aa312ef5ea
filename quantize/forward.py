"""The logits of a checkpoint, dense or quantized, computed one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.builder.checkpoints import Checkpoint
from slipstream.builder.models import architecture_of
from slipstream.quantize.activations import KVQuant, round_activations
from slipstream.quantize.skeleton import Skeleton, linears, watch_kv

Tokens = NDArray[np.int32]
_HEAD_ROWS = 512  # tokens whose logits are there at once


class CheckpointModel:
    """A checkpoint run by transformers' layers, each filled from the decoded weights in turn.

    Linears whose format rounds activations round them as their kernels would; ``kv`` rounds keys
    and values as a cache would. Memory is that of one layer, the embedding and the hidden states.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        kv: KVQuant | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.kv = kv
        self.skeleton = Skeleton(checkpoint.config, dtype)

    def logits(self, windows: Sequence[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
        """Of each window of token ids, on its own from position 0: float32 ``[T, vocab]`` for the
        first 512 tokens, the next 512, and so on, then those of the next window."""
        with torch.inference_mode():
            hidden = self.embed(windows)
            for index in range(self.checkpoint.config.num_layers):
                hidden = self.run_layer(index, hidden)
            norm = self.weights("model.norm.")
            yield from self._heads(hidden, norm["weight"])

    def embed(self, windows: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Hidden states ``[1, T, hidden]`` of each window before the first layer."""
        config, table = self.checkpoint.config, self.weight("model.embed_tokens.weight")
        scale = architecture_of(config.architecture).embedding_scale(config)
        return [table[torch.from_numpy(np.asarray(w, np.int64))][None] * scale for w in windows]

    def run_layer(self, index: int, hidden: list[Tensor]) -> list[Tensor]:
        """The hidden states after layer ``index``."""
        prefix = f"model.layers.{index}."
        with self.skeleton.filled(index, self.weights(prefix)) as layer:
            handles = [
                round_activations(linear, self.checkpoint.tensor(f"{prefix}{name}.weight"))
                for name, linear in linears(layer).items()
            ]
            watch_kv(layer, None if self.kv is None else self.kv.hook(index))
            try:
                return [self.skeleton.run(layer, states) for states in hidden]
            finally:
                watch_kv(layer, None)
                for handle in handles:
                    if handle is not None:
                        handle.remove()

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor below ``prefix`` by the rest of its name."""
        names = [name for name in self.checkpoint.names() if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.weight(name) for name in names}

    def weight(self, name: str) -> Tensor:
        """One weight, decoded."""
        values = self.checkpoint.tensor(name).load().dequantize()
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)

    def _heads(self, hidden: list[Tensor], norm: Tensor) -> Iterator[NDArray[np.float32]]:
        config = self.checkpoint.config
        name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        architecture = architecture_of(config.architecture)
        scale, cap = architecture.logits_scale(config), architecture.logits_cap(config)
        head = self.weight(f"{name}.weight")
        self.skeleton.norm.load_state_dict({"weight": norm}, assign=True)
        for states in hidden:
            for rows in torch.split(states[0], _HEAD_ROWS):
                logits = torch.nn.functional.linear(self.skeleton.norm(rows), head).float() * scale
                yield (cap * torch.tanh(logits / cap) if cap else logits).numpy()
