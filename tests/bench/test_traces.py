"""Workloads from traces: the published numbers, and everything left out is counted."""

import gzip
import hashlib

import numpy as np
import pytest

from jpd.bench import traces
from jpd.bench.workload import poisson

# SHA-256 of the decompressed file, then mean, std, p50, p90, p99, min and max of both columns.
# Statistics were computed from the files as published, not from the copies.
PUBLISHED = {
    "azure2023_conv": (
        "0e77f12176f1e69ab0a8937ac5a366077ea2c687ab3242eaea7144a6655dfcaa",
        (1154.7, 1108.8, 1020.0, 2734.5, 4142.0, 2, 14050),
        (211.1, 162.9, 129.0, 424.0, 601.0, 7, 1000),
    ),
    "azure2023_code": (
        "e8588ca8b3916bfe66a6df49d44099a07029341c7fb2ea2ad2324abf4001898a",
        (2047.8, 1973.8, 1469.0, 5187.6, 7436.0, 3, 7437),
        (27.9, 59.9, 13.0, 55.0, 251.5, 6, 1899),
    ),
    "arxiv_summarization": (
        "a7b6ad92d101d37b9e95a00e3d4c4ee3828e29972248ded31279d9829d3273e5",
        (2588.1, 944.7, 2730.0, 3702.0, 3933.4, 1, 4054),
        (291.4, 530.5, 167.0, 372.0, 3271.3, 5, 4056),
    ),
}


def whole(name):
    if name == "arxiv_summarization":
        return traces.arxiv(np.zeros(28257), seed=0)
    return {"azure2023_conv": traces.azure_conv, "azure2023_code": traces.azure_code}[name]()


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_are_as_published(name):
    digest, *published = PUBLISHED[name]
    data = gzip.decompress((traces.DATA / f"{name}.csv.gz").read_bytes())
    assert hashlib.sha256(data).hexdigest() == digest
    workload = whole(name)
    for column, expected in zip(
        (workload.prompt_tokens, workload.output_tokens), published, strict=True
    ):
        found = [column.mean(), column.std(), *np.percentile(column, (50, 90, 99))]
        assert found == pytest.approx(expected[:5], abs=0.051)
        assert (column.min(), column.max()) == expected[5:]


def test_the_package_holds_little_data_and_names_its_sources():
    files = [*traces.DATA.iterdir()]
    assert sum(file.stat().st_size for file in files) < 600_000
    readme = (traces.DATA / "README.md").read_text()
    for name, (digest, *_) in PUBLISHED.items():
        assert f"{name}.csv.gz" in readme
        assert digest in readme
    assert {f.name for f in files} == {"README.md", *(f"{name}.csv.gz" for name in PUBLISHED)}


@pytest.mark.parametrize(
    ("workload", "n", "span_s", "rate", "cv", "fit_4096"),
    [
        (traces.azure_conv, 19366, 3501.7, 5.5301, 1.094, 0.917),
        (traces.azure_code, 8819, 3435.9, 2.5664, 13.151, 0.857),
    ],
)
def test_arrivals_are_as_published(workload, n, span_s, rate, cv, fit_4096):
    workload = workload()
    gaps = np.diff(workload.arrivals_s)
    assert len(workload) == n
    assert workload.arrivals_s[-1] == pytest.approx(span_s, abs=0.05)
    assert workload.rate == pytest.approx(rate, abs=1e-4)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=1e-3)
    total = workload.prompt_tokens + workload.output_tokens
    assert (total <= 4096).mean() == pytest.approx(fit_4096, abs=5e-4)


def test_first_rows_of_the_conversation_trace():
    workload = traces.azure_conv()
    assert workload.arrivals_s[:4] == pytest.approx([0, 4.314579, 4.541877, 4.710427], abs=1e-9)
    assert workload.prompt_tokens[:4].tolist() == [374, 396, 879, 91]
    assert workload.output_tokens[:4].tolist() == [44, 109, 55, 16]


def test_arxiv_draws_rows_once_and_counts_what_does_not_fit():
    arrivals = poisson(2.0, 5000, seed=3)
    workload = traces.arxiv(arrivals, seed=3, max_total_tokens=2048)
    total = workload.prompt_tokens + workload.output_tokens
    assert total.max() <= 2048
    assert workload.left_out == 28257 - 5145  # 18.2 % fit
    assert np.array_equal(workload.arrivals_s, arrivals)
    # No row twice: the most frequent pair is no more frequent than in the data.
    everything = traces.arxiv(np.zeros(28257), seed=0)
    assert _most_frequent(workload) <= _most_frequent(everything)
    with pytest.raises(ValueError, match=r"n must be in 1\.\.5145, .* got 5146"):
        traces.arxiv(np.zeros(5146), seed=0, max_total_tokens=2048)


def _most_frequent(workload):
    pairs = np.stack([workload.prompt_tokens, workload.output_tokens], axis=1)
    return np.unique(pairs, axis=0, return_counts=True)[1].max()


def test_sharegpt_like_lengths_have_the_means_it_promises():
    workload = traces.sharegpt_like(np.zeros(60_000), seed=0)
    prompts, outputs = workload.prompt_tokens, workload.output_tokens
    assert prompts.mean() == pytest.approx(251, abs=3)
    assert outputs.mean() == pytest.approx(338, abs=4)
    assert (prompts.min(), prompts.max()) == (4, 1024)
    assert outputs.min() >= 4
    assert (prompts + outputs).max() <= 2048
    drawn = len(workload) + workload.left_out
    assert workload.left_out / drawn == pytest.approx(0.08, abs=0.005)


def test_sharegpt_like_under_a_lower_limit():
    workload = traces.sharegpt_like(np.zeros(500), seed=0, max_total_tokens=256)
    assert (workload.prompt_tokens + workload.output_tokens).max() <= 256
    assert workload.left_out > len(workload)  # most do not fit
    for limit in (7, 2049):
        with pytest.raises(ValueError, match=f"8 to 2048, got {limit}"):
            traces.sharegpt_like(np.zeros(5), seed=0, max_total_tokens=limit)


def test_fixed_lengths():
    workload = traces.fixed(np.arange(3.0), 100, 7)
    assert workload.prompt_tokens.tolist() == [100] * 3
    assert workload.output_tokens.tolist() == [7] * 3
    assert workload.name == "fixed_100_7"


@pytest.mark.parametrize("name", traces.NAMES)
def test_a_named_workload_has_its_number_rate_limit_and_seed(name):
    def make(**changes):
        options = {"rate": 8.0, "n": 300, "seed": 1, "max_total_tokens": 1024} | changes
        return traces.make(name, **options)

    def columns(workload):
        return [
            workload.arrivals_s.tolist(),
            workload.prompt_tokens.tolist(),
            workload.output_tokens.tolist(),
        ]

    workload = make()
    assert workload.name == name
    assert len(workload) == 300
    assert workload.arrivals_s[-1] == pytest.approx(300 / 8, rel=0.01)
    assert (workload.prompt_tokens + workload.output_tokens).max() <= 1024
    assert workload.left_out > 0
    assert columns(make()) == columns(workload)
    for mine, other in zip(columns(workload), columns(make(seed=2)), strict=True):
        assert mine != other
    faster = make(rate=16.0)  # the same requests, twice as fast
    assert columns(faster)[1:] == columns(workload)[1:]
    assert faster.arrivals_s == pytest.approx(workload.arrivals_s / 2)


def test_a_named_trace_gives_rows_of_the_trace_in_a_row():
    workload = traces.make("azure_code", rate=2.0, n=50, seed=7)
    trace = traces.azure_code()
    (start,) = (
        i
        for i in range(len(trace) - 49)
        if np.array_equal(trace.prompt_tokens[i : i + 50], workload.prompt_tokens)
    )
    gaps = np.diff(trace.arrivals_s[start : start + 50])
    assert np.diff(workload.arrivals_s) * (gaps.sum() / 24.5) == pytest.approx(gaps)


def test_unknown_names_and_too_many_requests():
    with pytest.raises(ValueError, match="azure_conv, azure_code, arxiv, sharegpt_like, got 'x'"):
        traces.make("x", rate=1.0, n=2, seed=0)
    with pytest.raises(ValueError, match=r"1\.\.8819, .* got 8820"):
        traces.make("azure_code", rate=1.0, n=8820, seed=0)
    assert len(traces.make("azure_code", rate=1.0, n=8819, seed=0)) == 8819
