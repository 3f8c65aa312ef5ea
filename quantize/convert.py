"""A quantized checkpoint into another layout, code by code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.checkpoints.huggingface.writer import DirectoryWriter, kv_arrays
from slipstream.builder.checkpoints.names import layer_of
from slipstream.builder.checkpoints.quantized import create_layout
from slipstream.builder.options import OutputFormat
from slipstream.errors import BuildError
from slipstream.quantize.staging import check_result, staging

# Told how many layers are done, and of how many.
Progress = Callable[[int, int], None]


def convert(
    source: str | Path, output: Path, format: OutputFormat, progress: Progress | None = None
) -> Checkpoint:
    """Write the checkpoint ``output``: the weights of ``source``, none changed, in a layout.

    Raises BuildError naming the first weight that the layout cannot hold exactly, and why, or if
    ``output`` exists; nothing is left behind then.
    """
    checkpoint = open_checkpoint(source)
    check_result(output, checkpoint.path)
    if output.exists():
        raise BuildError(f"{output} exists; choose another -o or remove it")
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    quantized = {t.name: (t.format, t.input) for t in tensors if t.format.kind != "dense"}
    if not quantized:
        raise BuildError(
            f"{checkpoint.path} is not quantized, so there is nothing to convert; use slipstream "
            "quantize"
        )
    layout = create_layout(format, quantized)
    if checkpoint.kv_scales is not None and not layout.holds_kv_scales:
        raise BuildError(
            f"{checkpoint.path} has scales of an fp8 KV cache, for which the layout {layout.name} "
            "has no place; use --format compressed-tensors"
        )
    layers = checkpoint.config.num_layers
    with staging(output, {}, resume=False) as place:
        writer = DirectoryWriter(place.checkpoint, layout, 1 + layers)
        _write(checkpoint, writer, progress)
        writer.describe(checkpoint, kv_scales=checkpoint.kv_scales is not None)
        checkpoint.write_tokenizer(place.checkpoint)
        open_checkpoint(place.checkpoint)
        place.publish(output)
    return open_checkpoint(output)


def _write(checkpoint: Checkpoint, writer: DirectoryWriter, progress: Progress | None) -> None:
    for layer in (None, *range(checkpoint.config.num_layers)):
        names = [name for name in checkpoint.names() if layer_of(name) == layer]
        if layer is None:
            writer.write(0, (checkpoint.tensor(name).load() for name in names))
            continue
        scales = checkpoint.kv_scales
        kv = None if scales is None else kv_arrays((scales.k[layer], scales.v[layer]), layer)
        writer.write(layer + 1, (checkpoint.tensor(name).load() for name in names), kv)
        if progress is not None:
            progress(layer + 1, checkpoint.config.num_layers)
