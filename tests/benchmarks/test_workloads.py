"""The trace as a list of requests: nothing clipped, everything left out is counted."""

import pytest

from benchmarks.workloads import azure_conv


def test_first_rows_that_fit():
    requests, left_out = azure_conv(4, max_total=20_000)
    assert requests == [(374, 44), (396, 109), (879, 55), (91, 16)]
    assert left_out == 0
    requests, left_out = azure_conv(3, max_total=800)
    assert requests == [(374, 44), (396, 109), (91, 16)]
    assert left_out == 1


def test_no_more_than_there_are():
    assert len(azure_conv(17754, max_total=4096).requests) == 17754
    with pytest.raises(ValueError, match=r"n must be in 1\.\.17754, .*got 17755"):
        azure_conv(17755, max_total=4096)
