"""The README's example runs, and its numbers are those of the stored results."""

import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def result(path: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / path).read_text())


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "My dear Elizabeth, " in out
    assert len(out) > 300


def test_decode_step_numbers():
    doc = result("h200/decode_step.json")
    rows = {(r["case"], r["impl"]): r for r in doc["rows"]}
    cells = re.compile(
        r"^\| Llama-(2-7B|3.1-8B), batch (\d+), context (\d+) \|(.*)\|$", re.MULTILINE
    )
    lines = cells.findall(README)
    assert len(lines) == sum(impl == "jpd" for _, impl in rows)
    for model, batch, context, rest in lines:
        name = {"2-7B": "llama2-7b", "3.1-8B": "llama31-8b"}[model]
        case = f"{name} B={batch} S={context}"
        ours, eager, static = (
            rows.get((case, impl)) for impl in ("jpd", "hf_eager", "hf_static_compile")
        )
        shown = [float(n) for n in re.findall(r"[\d.]+", rest.replace("×", ""))]
        expected = [round(ours["ms"], 2), round(ours["pct_of_bound"])]
        for theirs, digits in ((eager, 1), (static, 2)):
            if theirs is None:
                assert "not run" in rest
            else:
                expected += [round(theirs["ms"], 2), round(theirs["ms"] / ours["ms"], digits)]
        np.testing.assert_allclose(shown, expected, err_msg=case)


def test_other_numbers():
    throughput = result("h200/offline_throughput.json")["summary"]
    for key in ("tokens_per_s", "total_tokens_per_s"):
        assert f"{round(throughput[key]):,}" in README
    assert f"GPU idle {100 * throughput['gpu_idle_share']:.2f} %" in README
    host = result("cpu/host_overhead.json")["summary"]
    shown = "median {steady_median_ms:.2f} ms, p99 {steady_p99_ms:.2f} ms (with admissions "
    shown += "{churn_median_ms:.2f} and {churn_p99_ms:.2f})"
    assert shown.format(**host) in README


def test_kernel_numbers():
    attention = result("h200/decode_attention.json")["summary"]
    for text in (
        "{cases} cases | {geomean_vs_best_peer:.2f}× the faster of",
        "worst case {min_vs_best_peer:.2f}×; with 500 MB",
        "({pct_of_bw_large_over} such cases) it reads at {pct_of_bw_large:.0f} % of the rate",
        "{async_speedup_geomean:.2f}× in geometric mean, at best {async_speedup_max:.2f}×",
    ):
        assert text.format(**attention) in README
    assert f"({attention['copy_bytes_per_s'] / 1e12:.2f} TB/s)" in README
    flat = result("h200/flat_gemm.json")["summary"]
    for text in (
        "{geomean_vs_cublas_m_le_64_over} cases with at most 64 rows",
        "{geomean_vs_cublas_m_le_64:.2f}× cuBLAS in geometric mean, worst case",
        "{min_vs_cublas_m_le_64:.2f}×; at 64 rows",
    ):
        assert text.format(**flat) in README
