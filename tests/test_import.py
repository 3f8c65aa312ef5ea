"""``import slipstream`` costs next to nothing: counted in modules, since time is the machine's."""

from __future__ import annotations

import subprocess
import sys

# Of ours, and beyond what the interpreter has at its start; a tenth of a second is hundreds.
OURS = {"slipstream", "slipstream.errors"}
MOST = 60
CODE = """
import sys
before = set(sys.modules)
import slipstream
slipstream.__version__, slipstream.errors.SlipstreamError
print(*sorted(set(sys.modules) - before))
"""


def test_importing_the_package_imports_little_and_nothing_from_elsewhere() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    roots = {name.partition(".")[0] for name in loaded} - {"slipstream"}
    assert {name for name in loaded if name.startswith("slipstream")} == OURS
    assert roots <= sys.stdlib_module_names
    assert len(loaded) <= MOST
