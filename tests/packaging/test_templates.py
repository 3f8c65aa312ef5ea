"""Forms of issues are such as GitHub takes, and ask for commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from slipstream.server.cli import slipstream

FOLDER = Path(__file__).parents[2] / ".github"
FORMS = [file for file in sorted(FOLDER.glob("*/*.yml")) if file.stem != "config"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_wants(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    names = [part["id"] for part in content["body"]]
    assert len(set(names)) == len(names)
    for part in content["body"]:
        assert part["type"] in ("textarea", "input") and part["attributes"]["label"]
    for command in re.findall(r"slipstream (\w+) --", form.read_text()):
        assert command in slipstream.table
