from __future__ import annotations

from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.config import RuntimeConfig


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_seq_len": 1}, "max_seq_len is 1"),
        ({"page_size": 0}, "page_size is 0"),
        ({"scheduler_policy": "fifo"}, "known policies: max_utilization"),
        ({"max_batch_size": 64, "max_num_tokens": 32}, "Raise max_num_tokens"),
        ({"enable_chunked_prefill": False, "max_num_tokens": 64}, "enable chunked prefill"),
        ({"max_batch": 3}, "unknown runtime option max_batch; known options: max_batch_size"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        RuntimeConfig().override(options)


def test_override_keeps_the_rest() -> None:
    config = RuntimeConfig(page_size=8).override({"max_batch_size": 2})
    assert (config.page_size, config.max_batch_size) == (8, 2)
