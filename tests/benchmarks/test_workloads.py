"""The trace loader: nothing clipped, everything left out is counted."""

import hashlib
import lzma

import pytest

from benchmarks.workloads import AZURE_CONV, azure_conv


def test_the_file_is_the_published_trace():
    digest = hashlib.sha256(lzma.decompress(AZURE_CONV.read_bytes())).hexdigest()
    assert digest == "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8"


def test_first_rows_in_order_with_times_from_the_start():
    requests, left_out = azure_conv(4, max_total=None)
    assert [r[1:] for r in requests] == [(374, 44), (396, 109), (879, 55), (91, 16)]
    assert [r.timestamp_s for r in requests] == pytest.approx([0, 4.314579, 4.541877, 4.710427])
    assert left_out == 0


def test_long_requests_are_left_out_whole_and_counted():
    limit = 500
    requests, left_out = azure_conv(200, max_total=limit)
    everything = azure_conv(200 + left_out, max_total=None).requests
    assert left_out > 0
    assert requests == [r for r in everything if r.prompt_tokens + r.output_tokens <= limit]


def test_whole_trace_and_its_long_tail():
    assert len(azure_conv(19366, max_total=None).requests) == 19366
    requests, left_out = azure_conv(17754, max_total=4096)
    assert len(requests) == 17754
    assert left_out <= 19366 - 17754
    with pytest.raises(ValueError, match=r"n must be in 1\.\.17754, .* 4096 tokens, got 17755"):
        azure_conv(17755, max_total=4096)
    with pytest.raises(ValueError, match="got 0"):
        azure_conv(0, max_total=None)


def test_a_seed_draws_without_replacement_and_keeps_the_order():
    requests, left_out = azure_conv(100, max_total=4096, seed=1)
    stamps = [r.timestamp_s for r in requests]
    assert stamps == sorted(stamps)
    assert len(set(stamps)) == 100
    assert left_out == 19366 - 17754
    assert azure_conv(100, max_total=4096, seed=1).requests == requests
    assert azure_conv(100, max_total=4096, seed=2).requests != requests
