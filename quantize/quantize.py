"""A dense checkpoint to a quantized one, layer by layer, and how good it became."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.checkpoints.huggingface.writer import DirectoryWriter, kv_arrays
from slipstream.builder.checkpoints.names import layer_of
from slipstream.builder.models import architecture_of
from slipstream.errors import BuildError, CheckpointError
from slipstream.quantize.calibration_data import (
    EVALUATION_WINDOW,
    ApplyChatTemplate,
    Encode,
    Sample,
    calibration_windows,
    evaluation_windows,
)
from slipstream.quantize.checks import check_plan, check_space, is_foreign, layout_of
from slipstream.quantize.evaluate import Accuracy
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import Plan, make_plan
from slipstream.quantize.report.record import LinearRow, Report, peak_memory, versions
from slipstream.quantize.staging import (
    LayerRecord,
    Staging,
    check_result,
    describe_run,
    staging,
)
from slipstream.weights.tensor import KVScales, QuantTensor

if TYPE_CHECKING:
    from slipstream.quantize.layer import LayerResult, LinearStats

log = logging.getLogger(__name__)

Tokens = NDArray[np.int32]
# Told the stage, how much of it is done, and of how much in all.
Progress = Callable[[str, int, int], None]
CHOOSING, LAYERS, MEASURING = "choosing bits", "quantizing layers", "measuring"


@dataclass(frozen=True, slots=True)
class Text:
    """How a model reads text, and how it writes some (``sample``) where that is possible."""

    encode: Encode
    apply_chat_template: ApplyChatTemplate | None = None
    sample: Sample | None = None


def quantize(
    source: str | Path,
    output: Path,
    options: QuantizeOptions,
    text: Callable[[Checkpoint], Text],
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the quantized checkpoint ``output`` with its report, replacing an earlier result.

    ``text`` makes the tokenizer of a checkpoint. With ``resume``, the finished layers of a run that
    was cut short are kept. Raises CheckpointError for a source that cannot be quantized, BuildError
    for options that do not fit it and for a result that is worse than ``max_ppl_increase`` allows,
    InvalidRequestError for calibration text that is of no use; nothing is left behind then.
    """
    report = progress or (lambda stage, done, total: None)
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, options)
    check_result(output, checkpoint.path)
    check_plan(plan)
    run = _Run(checkpoint, plan, str(source), output, report)
    calibration, evaluation = _windows(plan, text(checkpoint))
    check_space(plan, output)
    with staging(output, describe_run(checkpoint, options), resume=resume) as place:
        return run.make(place, calibration, evaluation)


def _quantize_layers(plan: Plan) -> Callable[..., Iterator[LayerResult]]:
    """The function that makes this plan's layers, torch behind it."""
    module = "modelopt_adapter" if is_foreign(plan) else "layerwise"
    made: Callable[..., Iterator[LayerResult]] = import_module(
        f"slipstream.quantize.{module}"
    ).quantize_layers
    return made


def _windows(plan: Plan, text: Text) -> tuple[list[Tokens], list[Tokens]]:
    """The calibration windows, none where no data is needed, and those to measure on."""
    options, longest = plan.options, plan.config.context_length
    calibration: list[Tokens] = []
    if plan.calibrated:
        given = options.calib_dataset
        calibration = calibration_windows(
            text.encode,
            text.apply_chat_template,
            "self" if given == "self" else None if given is None else Path(given),
            options.calib_size,
            min(options.calib_max_seq_length, longest),
            options.seed,
            text.sample,
        )
    window = min(EVALUATION_WINDOW, longest)
    evaluation = None if options.eval_dataset is None else Path(options.eval_dataset)
    return calibration, evaluation_windows(
        text.encode, evaluation, window, text.apply_chat_template
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """One quantization: from the first shard to the name."""

    checkpoint: Checkpoint
    plan: Plan
    source: str
    output: Path
    progress: Progress

    def make(
        self, place: Staging, calibration: Sequence[Tokens], evaluation: Sequence[Tokens]
    ) -> Report:
        clock = _Clock(place.seconds)
        plan = self._with_chosen_bits(place, calibration)
        writer = self._writer(place, plan)
        self._write_layers(place, plan, writer, calibration, clock)
        kv_scales = _kv_scales(place.layers)
        writer.describe(self.checkpoint, kv_scales=kv_scales is not None)
        self.checkpoint.write_tokenizer(place.checkpoint)
        written = open_checkpoint(place.checkpoint)
        self._check_complete(written)
        _tell_fallbacks(place.layers)
        quantized = clock.seconds
        measured = self._measure(written, evaluation)
        seconds = {"quantize": quantized, "measure": clock.seconds - quantized}
        report = self._report(plan, place, calibration, measured, seconds, writer)
        _check_gate(report, plan.options)
        report.write(place.checkpoint)
        place.publish(self.output)
        return report

    def _with_chosen_bits(self, place: Staging, calibration: Sequence[Tokens]) -> Plan:
        """The plan; with ``auto_bits``, that which measured sensitivities lead to."""
        if self.plan.options.auto_bits is None:
            return self.plan
        if place.qformats is None:
            # Imported here because it needs torch, and a plan does not.
            from slipstream.quantize.sensitivity import choose_qformats

            place.qformats = choose_qformats(
                self.checkpoint, self.plan, calibration, partial(self.progress, CHOOSING)
            )
        return self.plan.with_qformats(place.qformats)

    def _writer(self, place: Staging, plan: Plan) -> DirectoryWriter:
        """The writer of all shards, with those that are done; the first has what is no layer."""
        writer = DirectoryWriter(place.checkpoint, layout_of(plan), 1 + plan.config.num_layers)
        if not place.started:
            outer = [name for name in self.checkpoint.names() if layer_of(name) is None]
            writer.stream(0, [self.checkpoint.tensor(name) for name in outer])
            place.save()
        else:
            for index, layer in enumerate([None, *place.layers]):
                writer.modules |= layer.modules if layer else {}
                writer.keep(index)
        return writer

    def _write_layers(
        self,
        place: Staging,
        plan: Plan,
        writer: DirectoryWriter,
        calibration: Sequence[Tokens],
        clock: _Clock,
    ) -> None:
        done, total = len(place.layers), plan.config.num_layers
        self.progress(LAYERS, done, total)
        results = _quantize_layers(plan)(
            self.checkpoint,
            plan,
            calibration,
            plan.options,
            done,
            self._finished(place, writer) if done else None,
        )
        for result in results:
            index = result.index
            scales = kv_arrays(result.kv, index) if result.kv is not None else None
            settings = writer.write(index + 1, result.tensors.values(), scales)
            rows = [_row(stat, plan) for stat in result.stats]
            place.layers.append(LayerRecord([asdict(row) for row in rows], settings, result.kv))
            place.seconds = clock.seconds
            place.save()
            self.progress(LAYERS, index + 1, total)

    def _finished(
        self, place: Staging, writer: DirectoryWriter
    ) -> Callable[[int], Mapping[str, QuantTensor]]:
        """Reads a finished layer back, as every reader of the result will."""
        writer.describe(self.checkpoint, kv_scales=_kv_scales(place.layers) is not None)
        written = open_checkpoint(place.checkpoint)

        def load(layer: int) -> Mapping[str, QuantTensor]:
            names = [name for name in written.names() if layer_of(name) == layer]
            return {name: written.tensor(name).load() for name in names}

        return load

    def _check_complete(self, written: Checkpoint) -> None:
        lost = set(self.checkpoint.names()) ^ set(written.names())
        if lost:
            raise CheckpointError(
                f"{len(lost)} tensors such as {min(lost)} are in only one of {self.source} and its "
                "quantized form; the checkpoint has tensors that its architecture does not use: "
                "remove them from it"
            )

    def _measure(self, written: Checkpoint, evaluation: Sequence[Tokens]) -> Accuracy:
        # Imported here because it needs torch, and a plan does not.
        from slipstream.quantize.measure import measure

        dtype = self.plan.options.kv_cache_dtype
        return measure(
            self.checkpoint, written, dtype, evaluation, partial(self.progress, MEASURING)
        )

    def _report(
        self,
        plan: Plan,
        place: Staging,
        calibration: Sequence[Tokens],
        measured: Accuracy,
        seconds: Mapping[str, float],
        writer: DirectoryWriter,
    ) -> Report:
        options = plan.options
        return Report(
            source=self.source,
            output=str(self.output),
            qformat=options.qformat,
            kv_cache_dtype=options.kv_cache_dtype,
            linears=[LinearRow(**row) for layer in place.layers for row in layer.rows],
            size=writer.nbytes,
            size_before=plan.source_nbytes,
            parameters=plan.parameters,
            accuracy=measured,
            calibration=_described(calibration, options),
            seed=options.seed,
            seconds=seconds,
            peak_memory=peak_memory(),
            options=asdict(options),
            versions=versions(),
            notes=plan.notes,
            loaders=_loaders(plan, writer),
        )


class _Clock:
    """Seconds of this run and of those that it goes on with."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def _row(stats: LinearStats, plan: Plan) -> LinearRow:
    n, k = plan.shape(stats.name)
    return LinearRow(
        name=stats.name,
        scheme=stats.scheme,
        group=stats.group,
        weights=n * k,
        bytes=stats.bytes,
        weight_error=stats.weight_error,
        output_error=stats.output_error,
        clip=stats.clip,
        alpha=stats.alpha,
        damping=stats.damping,
        fallback=stats.fallback,
        tokens_seen=stats.tokens_seen,
    )


def _tell_fallbacks(layers: Sequence[LayerRecord]) -> None:
    """Log what was not made as asked, each reason once."""
    named: dict[str, list[str]] = {}
    for row in (row for layer in layers for row in layer.rows if row["fallback"] is not None):
        named.setdefault(row["fallback"], []).append(row["name"])
    for fallback, names in named.items():
        more = ", …" * (len(names) > 1)
        log.warning("%d linears (%s%s): %s", len(names), names[0], more, fallback)


def _kv_scales(layers: Sequence[LayerRecord]) -> KVScales | None:
    scales = [layer.kv for layer in layers if layer.kv is not None]
    return KVScales(tuple(k for k, _ in scales), tuple(v for _, v in scales)) if scales else None


def _described(calibration: Sequence[Tokens], options: QuantizeOptions) -> str:
    if not calibration:
        return ""
    source = options.calib_dataset or "the text that comes with Slipstream"
    return f"{len(calibration)} windows of {len(calibration[0])} tokens of {source}"


def _loaders(plan: Plan, writer: DirectoryWriter) -> dict[str, str]:
    """What else loads the files; vLLM was not tried with experts."""
    loaders = writer.layout.loaders(writer.modules)
    if not plan.experts:
        return dict(loaders)
    table = architecture_of(plan.config.architecture)
    stacked = any(module.stack is not None for module in table.modules)
    apart = "it looks for the experts of a layer in one tensor" if stacked else ""
    return {name: apart or why for name, why in loaders.items() if name != "vLLM"}


def _check_gate(report: Report, options: QuantizeOptions) -> None:
    allowed, found = options.max_ppl_increase, report.accuracy
    if allowed is None or found is None or 100 * found.increase <= allowed:
        return
    tries = [*(worst.suggestion() for worst in report.worst()[:1]), "another --qformat"]
    raise BuildError(
        f"perplexity rose by {found.change}, from {found.reference} to {found.candidate}, and "
        f"max_ppl_increase is {allowed:g}%; nothing was written: try {', '.join(tries)}"
    )
