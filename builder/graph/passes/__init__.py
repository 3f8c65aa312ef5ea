"""Passes over a program: one file each, composed into literal pipelines by the targets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from slipstream.builder.graph.program import Program
from slipstream.builder.graph.verifier import verify

Pass = Callable[[Program], int]
log = logging.getLogger(__name__)


def run_passes(program: Program, pipeline: Sequence[Pass]) -> None:
    """Apply passes in order, log how often each matched, and verify the program after each."""
    verify(program, "the model")
    for transform in pipeline:
        name = _name(transform)
        matched = transform(program)
        program.drop_unused_weights()
        verify(program, name)
        log.info("pass %s: %d matches", name, matched)


def _name(transform: Pass) -> str:
    function = transform.func if isinstance(transform, partial) else transform
    return getattr(function, "__name__", None) or type(function).__name__
