from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.runtime.engine.scheduling import PAGE

from slipstream.runtime.engine import admission


@pytest.fixture(scope="module")
def one_page_is_awaited() -> Iterator[None]:
    """Sequences wait for those that compute a page of theirs, however short that is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "_WORTH", PAGE)
        yield
