"""How far a quantized checkpoint is from the one it was made of, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints import Checkpoint
from slipstream.quantize.activations import KVQuant
from slipstream.quantize.evaluate import Accuracy, accuracy
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.options import KVDtype
from slipstream.quantize.skeleton import States


def measure(
    source: Checkpoint,
    written: Checkpoint,
    kv_dtype: KVDtype,
    windows: Sequence[NDArray[np.int32]],
    progress: Callable[[int, int], None],
) -> Accuracy:
    """Compares predictions for ``windows``, with the rounding of a KV cache of ``kv_dtype``.

    ``progress`` is told how many layers of both have run, and of how many.
    """
    kv = None if kv_dtype == "auto" else KVQuant(kv_dtype, written.kv_scales)
    total, done = 2 * source.config.num_layers, 0

    def ran() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    progress(done, total)
    reference, candidate = _Watched(source), _Watched(written, kv=kv)
    reference.ran = candidate.ran = ran
    return accuracy(reference.logits(windows), candidate.logits(windows), windows)


class _Watched(CheckpointModel):
    """Says when it has run a layer."""

    ran: Callable[[], None] = staticmethod(lambda: None)

    def run_layer(self, index: int, states: list[States]) -> list[States]:
        after = super().run_layer(index, states)
        self.ran()
        return after
