"""The largest of a row against a full sort."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.runtime.sampling.rows import Floats

from slipstream.runtime.sampling.candidates import largest


@given(
    values=hnp.arrays(
        np.float32,
        st.integers(1, 1500),
        elements=st.sampled_from([-math.inf, -2.0, 0.0, 1.0, 1.5, 3.0]),
        fill=st.floats(-10, 10, width=32),
    ),
    k=st.integers(1, 700),
)
@settings(deadline=None)
def test_largest_equals_a_full_sort(values: Floats, k: int) -> None:
    ids = sorted(range(len(values)), key=lambda i: (-values[i], i))
    expected = [i for i in ids if values[i] > -math.inf and (values[i] >= values[ids[:k][-1]])]
    assert largest(values, k).tolist() == expected
