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
from slipstream.quantize.skeleton import INPUT_MODULES, Skeleton, States, linears, watch_kv
from slipstream.weights.tensor import reordered

Tokens = NDArray[np.int32]
_HEAD_ROWS = 512  # tokens whose logits are there at once
_EMBEDDING, _EMBEDDING_OF_INPUTS = "model.embed_tokens", "model.embed_tokens_per_layer"


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
            states = self.embed(windows)
            for index in range(self.checkpoint.config.num_layers):
                states = self.run_layer(index, states)
            norm = self.weights("model.norm.")
            yield from self._heads(states, norm["weight"])

    def embed(self, windows: Sequence[NDArray[Any]]) -> list[States]:
        """Each window before the first layer."""
        hidden, config = self._rows(_EMBEDDING, windows), self.checkpoint.config
        if not architecture_of(config.architecture).has(config, _EMBEDDING_OF_INPUTS):
            return [States(rows) for rows in hidden]
        weights = {f"{x}.weight": self.weight(f"model.{x}.weight") for x in INPUT_MODULES}
        given = zip(hidden, self._rows(_EMBEDDING_OF_INPUTS, windows), strict=True)
        return [States(x, self.skeleton.inputs(weights, x, rows)) for x, rows in given]

    def _rows(self, table: str, windows: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The rows ``[1, T, K]`` of an embedding; of those that no token has none is decoded."""
        config, stored = self.checkpoint.config, self.checkpoint.tensor(f"{table}.weight").load()
        scale = architecture_of(config.architecture).embedding_scale(config, table)
        tokens, places = np.unique(np.concatenate(windows), return_inverse=True)
        rows = torch.from_numpy(reordered(stored, tokens.astype(np.intp)).dequantize())
        of_all = (rows.to(self.dtype) * scale)[torch.from_numpy(places)]
        return [part[None] for part in torch.split(of_all, [len(window) for window in windows])]

    def run_layer(self, index: int, states: list[States]) -> list[States]:
        """The states after layer ``index``."""
        prefix = f"model.layers.{index}."
        with self.skeleton.filled(index, self.weights(prefix)) as layer:
            handles = [
                round_activations(linear, self.checkpoint.tensor(f"{prefix}{name}.weight"))
                for name, linear in linears(layer).items()
            ]
            watch_kv(layer, None if self.kv is None else self.kv.hook(index))
            try:
                return [self.skeleton.run(layer, each) for each in states]
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

    def _heads(self, states: list[States], norm: Tensor) -> Iterator[NDArray[np.float32]]:
        config = self.checkpoint.config
        name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        architecture = architecture_of(config.architecture)
        scale, cap = architecture.logits_scale(config), architecture.logits_cap(config)
        head = self.weight(f"{name}.weight")
        self.skeleton.norm.load_state_dict({"weight": norm}, assign=True)
        for each in states:
            for rows in torch.split(each.hidden[0], _HEAD_ROWS):
                logits = torch.nn.functional.linear(self.skeleton.norm(rows), head).float() * scale
                yield (cap * torch.tanh(logits / cap) if cap else logits).numpy()
