import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import Every


@given(st.integers(1, 50), st.integers(0, 100), st.integers(1, 33), st.integers(1, 60))
def test_every_counts_each_multiple_once_whatever_the_stride(interval, start, stride, calls):
    every = Every(interval, start=start)
    total = 0
    for step in range(stride, stride * calls + 1, stride):
        due = every(step)
        total += due
        # Brute force: the multiples after `start` that lie in (step - stride, step].
        assert due == sum(
            (s - start) % interval == 0 and s > start for s in range(max(step - stride, start) + 1, step + 1)
        )
    assert total == max(stride * calls - start, 0) // interval


def test_every_zero_is_never():
    every = Every(0)
    assert [every(step) for step in range(10)] == [0] * 10


def test_every_refuses_negative_intervals():
    with pytest.raises(ValueError, match="interval"):
        Every(-1)
