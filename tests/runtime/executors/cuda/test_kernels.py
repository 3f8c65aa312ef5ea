"""The kernels of an engine are known without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.eagle3_heads import MASK_TOKEN, random_tensors, save_head, specforge
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import LlamaConfig

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions

# Each records the same, with calls that are like others left out and with all of them.
SCRIPT = """
import json, sys
from pathlib import Path
from slipstream.builder.engine import KERNELS, open_engine
from slipstream.runtime.executors.cuda import program
from slipstream.runtime.executors.cuda.kernels import launched_kernels
from slipstream.server.engine_summary import read_graph
from slipstream.weights.safetensors import ArraySpec, read_header

engine = open_engine(Path(sys.argv[1]))
tensors = read_header(engine.path / "weights.safetensors").values()
parts = [ArraySpec(tensor.name, tensor.numpy_dtype(), tensor.shape) for tensor in tensors]

def launched(capability):
    found = launched_kernels(engine.manifest, read_graph(engine), parts, capability)
    return sorted(map(repr, found))

found = [launched((9, 0)), launched((9, 0))]
program._once = lambda call, run, made: call.kernel(run)
print(json.dumps([*found, launched((9, 0)), launched((8, 0))]))
assert "torch._dynamo" not in sys.modules, "torch's compiler takes longer to import than all this"
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    shape = {**TINY_SHAPE, "num_hidden_layers": 3}
    checkpoint = save_tiny(LlamaConfig(**shape), tmp_path_factory.mktemp("tiny"))
    options = BuildOptions(target="cuda", max_batch_size=4, max_num_tokens=64, max_seq_len=96)
    build(checkpoint, checkpoint / "engine", options)
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT, str(checkpoint / "engine")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_every_sort_of_kernel_is_among_them(recorded: list[list[str]]) -> None:
    found = "\n".join(recorded[0])
    for name in ("gemv_float", "dot_float", "decode_kernel", "prefill_kernel", "write_kernel"):
        assert f"name='{name}'" in found
    for name in ("embedding_rows", "argmax_kernel", "select_kernel", "logprobs_kernel"):
        assert f"name='{name}'" in found


def test_recording_leaves_nothing_behind(recorded: list[list[str]]) -> None:
    assert recorded[0] == recorded[1]


def test_a_layer_like_another_adds_nothing(recorded: list[list[str]]) -> None:
    assert recorded[0] == recorded[2]


def test_kernels_overlap_where_the_gpu_can(recorded: list[list[str]]) -> None:
    assert any("'launch_pdl': True" in kernel for kernel in recorded[0])
    assert not any("'launch_pdl': True" in kernel for kernel in recorded[3])


def test_those_of_drafts_are_among_them(recorded: list[list[str]]) -> None:
    """Attention of up to 4 and 8 tokens of a sequence, whoever guesses them."""
    found = [kernel for kernel in recorded[0] if "name='hopper_decode_kernel'" in kernel]
    found += [kernel for kernel in recorded[0] if "name='decode_kernel'" in kernel]
    assert len(found) >= 3
    assert len(set(recorded[0])) == len(recorded[0])


HEAD_SCRIPT = """
import json, sys
from pathlib import Path
from slipstream.builder.engine import open_engine
from slipstream.runtime.executors.cuda.kernels import launched_kernels
from slipstream.server.engine_summary import read_graph
from slipstream.weights.safetensors import ArraySpec, read_header

engine = open_engine(Path(sys.argv[1]))
tensors = read_header(engine.path / "weights.safetensors").values()
parts = [ArraySpec(tensor.name, tensor.numpy_dtype(), tensor.shape) for tensor in tensors]
head = read_graph(engine, "head")
found = launched_kernels(engine.manifest, read_graph(engine), parts, (9, 0), head=head)
print(json.dumps([kernel.name for kernel in found]))
"""


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_those_of_a_head_are_among_them(tmp_path: Path, masked: bool) -> None:
    config = specforge(pard_token=MASK_TOKEN) if masked else specforge()
    tensors = random_tensors(config)
    if masked:
        tensors["mask_hidden"] = np.ones((1, 192), np.float32)
    head = save_head(tmp_path / "head", config, tensors)
    checkpoint = save_tiny(LlamaConfig(**TINY_SHAPE), tmp_path)
    options = BuildOptions(target="cuda", max_batch_size=4, max_num_tokens=64, max_seq_len=96)
    build(checkpoint, tmp_path / "engine", replace(options, speculative_model=str(head)))
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", HEAD_SCRIPT, str(tmp_path / "engine")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = set(json.loads(done.stdout))
    assert {"follow_kernel", "best_kernel", "guess_kernel"} <= names
    assert {"advance_kernel", "places_kernel", "moved_kernel"} <= names
    assert ("masked_kernel" in names) == masked
