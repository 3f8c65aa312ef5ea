"""``slipstream doctor``: it asks the tables of targets, imports nothing heavy, and never fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest
from click.testing import CliRunner

from slipstream.builder.targets.base import known_targets
from slipstream.errors import BuildError
from slipstream.plugins import demands, library
from slipstream.plugins.cuda.detect import GPU, Driver
from slipstream.runtime.executors import known_executors
from slipstream.server.cli import slipstream
from slipstream.server.commands import doctor as module
from slipstream.server.doctor import machine, packages
from slipstream.server.doctor.packages import Package

HEAVY = {"gguf", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "tokenizers", "torch", "triton"}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(slipstream, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def needy(deed: str, *, thorough: bool) -> Sequence[str]:
    """Demands of a target that somebody else brings."""
    return (f"a dongle to {deed}: plug it in{' and shake it' if thorough else ''}",)


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from slipstream.server.cli import slipstream\n"
        "slipstream.main(['doctor', '--json'], standalone_mode=False)\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report, _, loaded = done.stdout.rpartition("LOADED")
    assert not HEAVY & set(loaded.split())
    assert {"slipstream", "machine", "packages", "targets", "lacks"} <= json.loads(report).keys()


def test_every_target_is_told_with_what_is_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"far": f"{__name__}:needy", "near": f"{__name__}:absent"}
    monkeypatch.setattr(demands, "_DEMANDS", table)
    monkeypatch.setattr(module, "known_targets", lambda: {"far": "", "built": "", "near": ""})
    monkeypatch.setattr(module, "known_executors", lambda: {"far": "", "near": ""})
    monkeypatch.setattr(demands, "load", lambda place, *_: loaded(place))
    targets = {target["name"]: target for target in json.loads(run("--json"))["targets"]}
    assert targets["far"]["build"] == ["a dongle to build: plug it in"]
    assert targets["far"]["run"] == ["a dongle to run: plug it in"]
    assert targets["built"]["build"] == []
    assert "nothing that is installed here can run it" in targets["built"]["run"][0]
    assert targets["near"]["run"] == ["it cannot be loaded"]
    text = run()
    assert "far    build: no   run: no" in text and "built  build: yes  run: no" in text
    assert "to build for far: a dongle to build: plug it in" in text


def loaded(place: str) -> demands.Demands:
    if place.endswith("absent"):
        raise BuildError("it cannot be loaded")
    return needy


def test_load_looks_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def lacks(target: str, deed: str, *, thorough: bool) -> Sequence[str]:
        asked.append(thorough)
        return ()

    monkeypatch.setattr(demands, "lacks", lacks)
    answers = {"torch": {"version": "2"}, "onnxruntime": {"error": "ImportError: libc"}}
    monkeypatch.setattr(packages, "load", lambda _: answers)
    text = run("--load")
    assert all(asked) and "torch        version 2" in text
    assert "onnxruntime does not load (ImportError: libc): install it again" in text


def test_a_gpu_and_packages_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver((13, 0), (GPU("NVIDIA H100", (9, 0), 80 << 30),))
    monkeypatch.setattr(machine, "driver", lambda: driver)
    found = [Package("torch", "2.13", "cuda"), Package("nvidia-modelopt", None, "modelopt")]
    monkeypatch.setattr(packages, "find", lambda: found)
    text = run()
    assert "up to CUDA 13.0" in text and "NVIDIA H100, sm_90, 80.0 GiB" in text
    assert "not installed: pip install 'slipstream[modelopt]'" in text
    gpus = json.loads(run("--json"))["machine"]["driver"]["gpus"]
    assert gpus == [{"name": "NVIDIA H100", "capability": [9, 0], "memory": 80 << 30}]


def test_what_two_targets_lack_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "known_targets", lambda: {"far": "", "near": ""})
    monkeypatch.setattr(module, "known_executors", lambda: {"far": "", "near": ""})
    monkeypatch.setattr(demands, "lacks", lambda *_, thorough: ("no dongle: plug it in",))
    text = run()
    assert "to run far and near: no dongle: plug it in" in text
    assert text.count("no dongle") == 2  # to build, to run


def test_two_packages_of_one_target_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def collide() -> dict[str, str]:
        raise BuildError("two packages bring far; uninstall one of them")

    monkeypatch.setattr(module, "known_targets", collide)
    assert "two packages bring far; uninstall one of them" in run()


def test_every_target_of_ours_has_an_executor_and_the_other_way_round() -> None:
    assert set(known_targets()) == set(known_executors())


def test_a_library_that_was_not_compiled_is_what_the_cpu_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "SUFFIX", ".nowhere")
    for function in (library.path, library.load):
        function.cache_clear()
    text = run()
    assert "to run cpu: The native CPU plugins" in text and "pip install" in text


def test_what_every_target_needs_is_in_the_way_of_each_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "find", lambda: [Package("numpy", None)])
    sentence = "numpy is not installed: pip install numpy"
    report = json.loads(run("--json"))
    assert report["lacks"] == [sentence]
    assert all(target["build"][0] == sentence == target["run"][0] for target in report["targets"])
    assert run().count(sentence) == 1
