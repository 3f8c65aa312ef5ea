from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from slipstream import LLM, SamplingParams
from slipstream.builder.cache import cache_directory
from slipstream.builder.contract import page_size_of
from slipstream.builder.engine import open_engine
from slipstream.errors import CapacityError, CheckpointError, EngineMismatchError
from slipstream.errors import InvalidRequestError as Invalid
from slipstream.runtime.loading import load, runtime_config

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


def test_an_engine_brings_its_limits(tiny_engine: Path) -> None:
    loaded = load(tiny_engine, {})
    config, manifest = loaded.config, open_engine(tiny_engine).manifest
    assert (config.max_batch_size, config.max_num_tokens) == (64, 512)
    assert (config.max_seq_len, config.page_size) == (512, page_size_of(manifest.caches))
    assert loaded.vocab_size == 320
    loaded.executor.shutdown()


def test_less_than_the_limits_can_be_asked_for(tiny_engine: Path) -> None:
    loaded = load(str(tiny_engine), {"max_num_tokens": 16, "max_seq_len": 100, "num_threads": 1})
    assert (loaded.config.max_num_tokens, loaded.config.max_seq_len) == (16, 100)
    assert loaded.config.max_batch_size == 16, "a step holds one token of every sequence"
    loaded.executor.shutdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 513}, "max_seq_len is 513, but .* was built for 512; .*--max-seq-len 513"),
        ({"max_batch_size": 65}, "max_batch_size is 65, but .* was built for 64"),
        ({"max_num_tokens": 513}, "max_num_tokens is 513, but .* was built for 512"),
        ({"page_size": 16}, "page_size is 16, but .* was built for 32"),
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be at least 1"),
        ({"quantization": "int8_wo"}, "is an engine, so quantization cannot be set: known options"),
        ({"colour": "red"}, "is an engine, so colour cannot be set: known options are max_batch"),
        ({"scheduler_policy": "fair"}, "scheduler_policy is 'fair'; known policies"),
    ],
)
def test_options_that_an_engine_cannot_take(
    tiny_engine: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Invalid, match=message):
        load(tiny_engine, options)


def test_none_leaves_an_option_to_the_engine(tiny_engine: Path) -> None:
    loaded = load(tiny_engine, {"max_seq_len": None, "kv_cache_bytes": None, "page_size": None})
    assert (loaded.config.max_seq_len, loaded.config.page_size) == (512, 32)
    loaded.executor.shutdown()


FILES = sorted(["graph.onnx", "tokenizer.json", "tokenizer_config.json", "weights.safetensors"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["changed", "truncated", "emptied", "missing"])
def test_a_damaged_file_is_refused(engine: Path, name: str, damage: str) -> None:
    """Whatever else the damage breaks, the message names the file and how to mend it."""
    data = bytearray((engine / name).read_bytes())
    data[-len(data) // 3] ^= 1
    if damage == "missing":
        (engine / name).unlink()
    else:
        size = {"changed": len(data), "truncated": len(data) // 2, "emptied": 0}[damage]
        (engine / name).write_bytes(data[:size])
    with pytest.raises(EngineMismatchError, match=f"^{name} .*; build it again: slipstream build"):
        load(engine, {})


def test_a_graph_that_onnxruntime_refuses(engine: Path) -> None:
    (engine / "graph.onnx").write_bytes(b"garbage")
    rehash(engine, "graph.onnx")
    with pytest.raises(EngineMismatchError, match=r"onnxruntime .* refuses the graph of .* again"):
        load(engine, {})


def test_weights_may_lie_elsewhere_behind_a_link(engine: Path, tmp_path: Path) -> None:
    """On another disk, under another name."""

    def answer() -> list[int]:
        with LLM(engine) as llm:
            return llm.generate("the quick", GREEDY)[0].outputs[0].token_ids

    expected = answer()
    (tmp_path / "disk").mkdir()
    (engine / "weights.safetensors").rename(tmp_path / "disk" / "blob")
    (engine / "weights.safetensors").symlink_to(tmp_path / "disk" / "blob")

    assert answer() == expected


@pytest.mark.parametrize("limit", ["max_num_tokens", "max_seq_len"])
def test_limits_whose_tables_no_machine_holds(engine: Path, limit: str) -> None:
    raw = json.loads((engine / "engine.json").read_text())
    raw["limits"][limit] = 2**31 - 1
    (engine / "engine.json").write_text(json.dumps(raw))
    with pytest.raises(CapacityError, match=rf"{limit} 2147483647 .* MiB; ask for less"):
        load(engine, {})


def rewrite(engine: Path, edit: Callable[[ir.Graph], None]) -> None:
    """Edit the graph, and tell the manifest."""
    model = ir.load(engine / "graph.onnx")
    edit(model.graph)
    ir.save(model, engine / "edited.onnx")
    (engine / "edited.onnx").rename(engine / "graph.onnx")
    rehash(engine, "graph.onnx")


@pytest.mark.parametrize("attribute", ["num_heads", "num_kv_heads", "head_dim", "page_size"])
@pytest.mark.parametrize("value", [0, -1, 2**32, 2**60, 2**60 + 32, 2**62 + 16])
def test_a_graph_with_absurd_attributes(engine: Path, attribute: str, value: int) -> None:
    def edit(graph: ir.Graph) -> None:
        node = next(node for node in graph if node.op_type == "PagedAttention")
        node.attributes[attribute] = ir.AttrInt64(attribute, value)

    rewrite(engine, edit)
    with pytest.raises(EngineMismatchError, match=f"refuses .* attribute {attribute} is {value}"):
        load(engine, {})


def test_a_graph_that_does_not_take_what_the_manifest_says(engine: Path) -> None:
    file = engine / "engine.json"
    raw = json.loads(file.read_text())
    logits = raw["graphs"]["target"]["outputs"][0]
    logits["shape"][1] += 1
    file.write_text(json.dumps(raw))
    with pytest.raises(EngineMismatchError, match=r"outputs of graph.onnx .* logits is .*; build"):
        load(engine, {})


def test_an_engine_of_another_target(engine: Path) -> None:
    file = engine / "engine.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target": "abacus"}))
    with pytest.raises(EngineMismatchError, match="built for target 'abacus'; this works for"):
        load(engine, {})


def rehash(engine: Path, name: str) -> None:
    """Make a manifest agree with an edited file."""
    from slipstream.builder.engine import digest

    raw = json.loads((engine / "engine.json").read_text())
    raw["files"][name] = digest(engine / name)
    (engine / "engine.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("content", "temperature", "top_k"),
    [
        ({}, 1.0, 0),
        ({"temperature": 0.5, "top_k": 7}, 0.5, 7),
        ({"do_sample": True, "temperature": 0.5}, 0.5, 0),
        ({"do_sample": False, "temperature": 0.5}, 0.0, 0),
    ],
)
def test_defaults_of_sampling_come_from_the_model(
    engine: Path, content: dict[str, Any], temperature: float, top_k: int
) -> None:
    (engine / "generation_config.json").write_text(json.dumps(content))
    rehash(engine, "generation_config.json")
    loaded = load(engine, {})
    defaults = loaded.generation_defaults
    assert (defaults.temperature, defaults.top_k) == (temperature, top_k)
    loaded.executor.shutdown()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, (0.7, 0.95, 0.05)),
        ({"temperature": 1.0}, (1.0, 0.95, 0.05)),
        ({"temperature": 0.6, "top_p": 0.9, "min_p": 0}, (0.6, 0.9, 0.0)),
        ({"do_sample": False}, (0.0, 0.95, 0.05)),
        (None, (0.7, 0.95, 0.05)),
    ],
)
def test_people_get_a_calmer_distribution_where_the_model_says_nothing(
    engine: Path, content: dict[str, Any] | None, expected: tuple[float, float, float]
) -> None:
    if content is None:
        raw = json.loads((engine / "engine.json").read_text())
        del raw["files"]["generation_config.json"]
        (engine / "engine.json").write_text(json.dumps(raw))
        (engine / "generation_config.json").unlink()
    else:
        (engine / "generation_config.json").write_text(json.dumps(content))
        rehash(engine, "generation_config.json")
    loaded = load(engine, {})
    loaded.executor.shutdown()
    params = loaded.interactive_defaults
    assert (params.temperature, params.top_p, params.min_p) == expected
    uncut = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, **(content or {})}
    if content != {"do_sample": False}:
        assert loaded.generation_defaults == SamplingParams(**uncut)


def test_a_checkpoint_is_built_into_the_cache(
    tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = []
    for model in (tiny_engine, tiny_checkpoint, tiny_checkpoint):
        with LLM(model, num_threads=1) as llm:
            texts.append(llm.generate("the quick", GREEDY)[0].outputs[0].token_ids)
    assert texts[0] == texts[1] == texts[2]
    (cached,) = cache_directory().iterdir()
    assert open_engine(cached).manifest.quantization == "none"
    options: dict[str, Any] = {"quantization": "int8_wo", "max_seq_len": 64, "max_num_tokens": 64}
    with LLM(str(tiny_checkpoint), **options) as llm:
        llm.generate("the quick", GREEDY)
    (other,) = (path for path in cache_directory().iterdir() if path != cached)
    manifest = open_engine(other).manifest
    assert (manifest.quantization, manifest.limits.max_seq_len) == ("int8_wo", 64)


def test_options_that_a_checkpoint_cannot_take(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        Invalid, match=r"unknown option quantisation; known options: max_batch_size"
    ):
        LLM(tiny_checkpoint, quantisation="int8_wo")
    with pytest.raises(CheckpointError, match="does not exist"):
        LLM(tmp_path / "no" / "such" / "model")
    assert not list(tmp_path.iterdir())


def test_a_cache_that_holds_no_page(tiny_engine: Path) -> None:
    with pytest.raises(CapacityError, match=r"100 bytes of KV cache hold no page; one page takes"):
        LLM(tiny_engine, kv_cache_bytes=100)


def test_running_an_engine_imports_no_compiler(tiny_engine: Path) -> None:
    code = (
        "import sys; from slipstream import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], num_threads=1)\n"
        "llm.generate('the', SamplingParams(max_tokens=2))\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'gguf', 'slipstream.quantize'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_chat_template_is_given_at_run_time(tiny_engine: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("mine: {{ messages[0].content }}")
    loaded = load(tiny_engine, {"chat_template": str(template)})
    loaded.executor.shutdown()
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.tokenizer.apply_chat_template(chat) == "mine: hi"

    template.write_text("{% broken")
    with pytest.raises(CheckpointError, match=r"not valid Jinja .*--chat-template FILE"):
        load(tiny_engine, {"chat_template": str(template)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_cache_free_gpu_memory_fraction": 0.5},
            "kv_cache_free_gpu_memory_fraction does nothing for .*: it is for a CPU",
        ),
        ({"kv_cache_bytes": 1 << 20, "kv_cache_free_gpu_memory_fraction": 0.5}, "does nothing"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tiny_engine: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Invalid, match=message):
        load(tiny_engine, options)


@pytest.mark.parametrize(
    ("capability", "refused"),
    [("CPUExecutionProvider", True), ("CUDAExecutionProvider", False)],
)
def test_a_share_of_a_gpu_is_refused_where_onnxruntime_runs_on_a_cpu(
    tiny_engine: Path, capability: str, refused: bool
) -> None:
    engine = open_engine(tiny_engine)
    manifest = replace(engine.manifest, target="onnxruntime", capability=capability)
    options = {"kv_cache_free_gpu_memory_fraction": 0.5}
    if refused:
        with pytest.raises(Invalid, match=r"memory_fraction does nothing for .*it is for a CPU"):
            runtime_config(replace(engine, manifest=manifest), options)
    else:
        runtime_config(replace(engine, manifest=manifest), options)


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
@pytest.mark.parametrize("name", ["num_threads", "kv_offload_path"])
def test_gpus_refuse_what_is_for_a_cpu(tiny_engine: Path, target: str, name: str) -> None:
    engine = open_engine(tiny_engine)
    on_a_gpu = replace(engine, manifest=replace(engine.manifest, target=target))
    with pytest.raises(Invalid, match=f"{name} does nothing for .* GPU.*leave it out"):
        runtime_config(on_a_gpu, {name: 1})


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"target": "onnxruntime"}, {}, "its executor keeps no pages on the host"),
        ({"target": "tensorrt"}, {"kv_offload_path": "kv"}, "a GPU copies pages to memory"),
        ({"ranks": 2}, {}, "its ranks keep no pages on the host.*tp_size 1"),
    ],
)
def test_engines_that_keep_no_pages_on_the_host(
    tiny_engine: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    """They say so before anything is loaded."""
    opened = open_engine(tiny_engine)
    engine = replace(opened, manifest=replace(opened.manifest, **changes))
    with pytest.raises(Invalid, match=f"does nothing for .*{message}"):
        runtime_config(engine, {"kv_offload_gib": 1.0, **options})
    assert runtime_config(engine, {"kv_offload_gib": 0.0}).kv_offload_gib == 0
    if not options:  # nor are prompts handed over
        with pytest.raises(Invalid, match=f"kv_transfer_gib does nothing for .*{message}"):
            runtime_config(engine, {"kv_transfer_gib": 1.0})
