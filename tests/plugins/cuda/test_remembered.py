"""Whose kernels are compiled is known for as long as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slipstream.plugins.cuda import remembered
from slipstream.plugins.cuda.precompile import Specialization
from slipstream.plugins.cuda.remembered import are_compiled, mark_of, remember
from slipstream.plugins.gated_mlp import cuda_kernels as gated_mlp


def test_what_is_remembered_goes_with_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    mark = mark_of("engine", "H100")
    assert not are_compiled(mark)
    kernel = Specialization(gated_mlp.__name__, "gated_kernel", {}, {}, {}, {})
    remember(mark, [kernel, kernel])
    settled: list[object] = []
    monkeypatch.setattr(remembered, "settle_key", settled.append)
    assert are_compiled(mark) and are_compiled(mark_of("engine", "H100"))
    assert settled == [gated_mlp.gated_kernel] * 2, "or the launch would not find them"
    shutil.rmtree(tmp_path)
    assert not are_compiled(mark)


@pytest.mark.parametrize(
    ("module", "name"), [("no_such_package.kernels", "kernel"), (gated_mlp.__name__, "no_kernel")]
)
def test_kernels_that_are_not_there_any_more_are_looked_for_again(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    mark = mark_of("engine", "H100")
    remember(mark, [Specialization(module, name, {}, {}, {}, {})])
    assert not are_compiled(mark)


def test_other_engines_devices_and_settings_of_triton_have_other_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marks = [mark_of("engine", "H100"), mark_of("other", "H100"), mark_of("engine", "H200")]
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    marks.append(mark_of("engine", "H100"))
    assert len(set(marks)) == 4
