"""What metadata says of packages, and what libraries say of themselves."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from slipstream.server.doctor import packages
from slipstream.server.doctor.packages import Package

ROOT = Path(__file__).parents[3]
REQUIRES = [
    "numpy>=1.26",
    "onnxruntime>=1.24",
    'uvloop>=0.21; sys_platform != "win32"',
    'Torch>=2.11; extra == "cuda"',
    'torch>=2.11; extra == "quantize"',
    "nvidia_modelopt<0.48; extra == 'modelopt'",
    'ruff>=0.11; extra == "dev"',
]


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """These distributions and no others; an underscore stands for a hyphen."""
    names = {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return names[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIRES)


def test_needs_extras_and_what_runs_engines_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, numpy="2.0", onnxruntime_gpu="1.31", torch="2.13", tensorrt_rtx="1.7")
    assert packages.find() == [
        Package("numpy", "2.0"),
        Package("nvidia-modelopt", None, "modelopt"),
        Package("onnxruntime", None),
        Package("onnxruntime-gpu", "1.31"),
        Package("tensorrt-rtx", "1.7"),
        Package("torch", "2.13", "cuda"),
        Package("uvloop", None),
    ]


def test_what_is_missing_or_twice_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, numpy="2.0", onnxruntime_gpu="1.31", uvloop="1")
    assert packages.missing(packages.find()) == packages.clashes(packages.find()) == []
    installed(monkeypatch, onnxruntime="1.32", onnxruntime_gpu="1.31", uvloop="1")
    (missing,), (twice,) = packages.missing(packages.find()), packages.clashes(packages.find())
    assert missing == "numpy is not installed: pip install numpy"
    assert twice.startswith("onnxruntime and onnxruntime-gpu overwrite each other's files: pip un")


def test_a_checkout_that_was_not_installed_has_no_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.13")

    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert packages.find() == [Package("torch", "2.13")]


@pytest.mark.parametrize(
    ("name", "extra"),
    [("torch", "cuda"), ("transformers", "quantize"), ("msgspec", "kv-events"), ("tqdm", "dynamo")],
)
def test_the_extra_that_is_named_is_the_one_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    """Metadata has the extras in the order of the project's file."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    told = [f'{each}; extra == "{key}"' for key, given in extras.items() for each in given]
    monkeypatch.setattr(metadata, "requires", lambda _: told)
    assert {p.name: p.extra for p in packages.find()}[name] == extra


def test_every_extra_is_in_the_page() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    page = (ROOT / "docs" / "installing.md").read_text()
    assert [extra for extra in extras if f"\n| `{extra}` |" not in page] == []


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("{'version': print('noise') or '1'}", {"version": "1"}),
        ("1 / 0", {"error": "ZeroDivisionError: division by zero"}),
        ("__import__('os')._exit(3)", {"error": "it ended with status 3"}),
        ("__import__('os').abort()", {"error": "it ended with status -6"}),
    ],
)
def test_a_library_is_asked_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, question: str, answer: dict[str, str]
) -> None:
    monkeypatch.setattr(packages, "_MODULES", {"text": "textwrap", "more": "absent"})
    monkeypatch.setattr(packages, "_QUESTIONS", {"textwrap": question})
    assert packages.load([Package("text", "1"), Package("more", None)]) == {"textwrap": answer}


def test_a_library_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_MODULES", {"text": "textwrap"})
    monkeypatch.setattr(packages, "_QUESTIONS", {"textwrap": "__import__('time').sleep(60)"})
    monkeypatch.setattr(packages, "_SECONDS", 0.2)
    assert "timed out" in str(packages.load([Package("text", "1")])["textwrap"]["error"])
