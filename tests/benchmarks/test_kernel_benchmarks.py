"""What the kernel benchmarks compute on the host: cases, ratios, summaries, references, timing."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import (
    dataflow,
    decode_attention,
    dense_gemm,
    device_time,
    flat_gemm,
    mps,
    prefill_attention,
    share_problems,
    sm_shares,
)
from benchmarks.attention_cases import (
    DECODE,
    PAGE_TOKENS,
    PREFILL,
    Decode,
    Pages,
    Prefill,
    select,
)
from benchmarks.attention_reference import paged_rows, worst_row_error
from benchmarks.baselines import flashinfer_attention, torch_attention, torch_gemm
from benchmarks.gemm_cases import LAYERS, Gemm, shapes
from benchmarks.gemm_impls import is_xla, product
from benchmarks.gemm_runs import checked_rows
from benchmarks.peers import run_peer
from benchmarks.ratios import fill_bounds, geomean, speedups
from benchmarks.report import Report
from benchmarks.rows import failed_row, load, make_row, skipped_row
from native.mps import MpsError
from pallas_kernels.dataflow import Choice

ROOT = Path(benchmarks.__file__).parents[1]


def row(case, impl, us, **extra):
    return make_row(case, impl, [us], "us", **extra)


# --- cases ----------------------------------------------------------------------------------


def test_decode_cases_are_those_that_must_be_shown():
    assert len(DECODE) >= 14
    assert len({case.name for case in DECODE}) == len(DECODE)
    assert {(c.q_heads, c.kv_heads) for c in DECODE} >= {(32, 32), (32, 8), (28, 4), (64, 8)}
    assert min(c.batch for c in DECODE) == 1
    assert max(c.batch for c in DECODE) == 128
    assert min(c.context for c in DECODE) == 512
    assert max(c.context for c in DECODE) == 32768
    assert any(c.ragged for c in DECODE)
    assert any(c.kv_bytes >= decode_attention.LARGE_KV_BYTES for c in DECODE)


def test_decode_bytes_and_flops():
    case = Decode(8, 32, 8, 1024)
    assert case.kv_bytes == 8 * 1024 * 8 * 128 * 2 * 2
    assert case.nbytes == case.kv_bytes + 2 * (8 * 32 * 128) * 2
    assert case.flops == 2 * 2 * 8 * 1024 * 32 * 128
    ragged = Decode(8, 32, 8, 1024, ragged=True)
    assert ragged.lengths.max() == 1024
    assert ragged.lengths.min() >= 128
    assert len(set(ragged.lengths.tolist())) > 4
    assert np.array_equal(ragged.lengths, Decode(8, 32, 8, 1024, ragged=True).lengths)


def test_every_page_belongs_to_one_sequence():
    lengths = np.array([1, 16, 17, 100], np.int32)
    pages = Pages.shuffled(lengths)
    needed = [1, 1, 2, 7]
    used = np.concatenate([row[:n] for row, n in zip(pages.table, needed, strict=True)])
    assert sorted(used.tolist()) == list(range(pages.count)) == list(range(11))
    assert pages.table.shape == (4, 7)
    indptr, indices, last = flashinfer_attention.page_list(pages, lengths)
    assert indptr.tolist() == [0, 1, 2, 4, 11]
    assert np.array_equal(indices, used)
    assert last.tolist() == [1, 16, 1, 4]


def test_prefill_flops_count_the_pairs_that_are_seen():
    case = Prefill(4, 2, ((3, 0), (2, 5)))
    pairs = 1 + 2 + 3 + 6 + 7
    assert case.flops == 4 * 4 * 128 * pairs
    assert case.starts.tolist() == [0, 3]
    owner, seen = case.owners(np.arange(5))
    assert owner.tolist() == [0, 0, 0, 1, 1]
    assert seen.tolist() == [1, 2, 3, 6, 7]
    assert set(case.sample()) <= set(range(5))
    assert {0, 2, 3, 4} <= set(case.sample())
    assert len({case.name for case in PREFILL}) == len(PREFILL)


def test_cases_are_selected_by_name_or_its_beginning():
    assert select(DECODE, None) == DECODE
    assert select(DECODE, ["B=8 32/8 S=8192"]) == [Decode(8, 32, 8, 8192)]
    assert len(select(DECODE, ["B=8 32/8"])) > 1
    with pytest.raises(ValueError, match="no case is called 'B=7'"):
        select(DECODE, ["B=7"])


def test_gemm_shapes_are_those_of_the_models():
    assert len(shapes("llama2-7b", "llama31-8b")) == 7
    assert len(shapes(*(m for m in LAYERS if m != "tiny"))) == 15
    case = Gemm.parse("8:4096:11008")
    assert case.name == "4096x11008 M=8"
    assert case.nbytes == 2 * (4096 * 11008 + 8 * 11008 + 8 * 4096)
    assert case.flops == 2 * 8 * 4096 * 11008
    for rows in (1, 7, 128, 8192):
        checked = checked_rows(rows)
        assert checked[0] == 0
        assert checked[-1] == rows - 1


def test_products_that_xla_computes_are_known(monkeypatch):
    """They are compiled and measured after all others."""
    chosen = {8: "flat_gemm", 128: "xla"}
    monkeypatch.setattr(
        "pallas_kernels.dataflow.choose", lambda m, n, k: Choice(chosen[m], None, "table")
    )
    for rows in chosen:
        assert is_xla("xla", rows, 64, 64)
        assert not is_xla("flat_gemm", rows, 64, 64)
    assert [is_xla("table", rows, 64, 64) for rows in chosen] == [False, True]
    assert [dataflow.has_xla("tiny", rows, "table") for rows in chosen] == [False, True]


# --- ratios and summaries -------------------------------------------------------------------


def test_speedups_are_against_the_best_peer_that_worked():
    rows = [
        row("a", "ours", 10.0),
        row("a", "p", 15.0),
        row("a", "q", 12.0),
        row("b", "ours", 10.0),
        failed_row("b", "p", "no"),
        row("b", "q", 5.0),
        row("c", "ours", 1.0),
        failed_row("d", "ours", "no"),
        row("d", "p", 1.0),
    ]
    assert speedups(rows, "ours", ["p", "q"]) == pytest.approx({"a": 1.2, "b": 0.5})
    assert geomean([1.2, 0.5]) == pytest.approx(math.sqrt(0.6))
    with pytest.raises(ValueError, match="positive"):
        geomean([])


def test_bounds_are_bytes_over_the_rate():
    rows = [row("a", "ours", 10.0, nbytes=20_000_000), failed_row("b", "ours", "no")]
    fill_bounds(rows, 4e12)
    assert rows[0]["pct_of_bound"] == pytest.approx(50.0)
    assert rows[1]["pct_of_bound"] is None


def test_decode_summary():
    small, large = Decode(1, 32, 8, 8192), Decode(64, 32, 8, 4096)
    rows = [
        row(small.name, "jpd_async", 10.0, nbytes=small.nbytes),
        row(small.name, "jpd_sync", 12.0, nbytes=small.nbytes),
        row(small.name, "flashinfer", 11.0),
        row(small.name, "jax_triton", 99.0),
        row(large.name, "jpd_async", 260.0, nbytes=large.nbytes),
        row(large.name, "jpd_sync", 260.0, nbytes=large.nbytes),
        row(large.name, "torch_sdpa", 234.0),
    ]
    fill_bounds(rows, 4.3e12)
    summary = decode_attention.summarise(rows, [small, large])
    assert summary["geomean_vs_best_peer"] == pytest.approx(math.sqrt(1.1 * 0.9))
    assert summary["min_vs_best_peer"] == pytest.approx(0.9)
    assert summary["async_speedup_geomean"] == pytest.approx(math.sqrt(1.2))
    assert summary["async_speedup_max"] == pytest.approx(1.2)
    assert summary["pct_of_bw_large"] == pytest.approx(100 * large.nbytes / 4.3e12 / 260e-6)
    # The default decides what is held against the peers.
    other = decode_attention.summarise(rows, [small, large], "sync")
    assert other["geomean_vs_best_peer"] == pytest.approx(math.sqrt(11 / 12 * 0.9))


def test_gemm_summaries():
    cases = [Gemm(1, 64, 64), Gemm(64, 64, 64), Gemm(128, 64, 64)]
    rows = []
    for case, ours, theirs in zip(cases, (1.0, 2.0, 4.0), (1.5, 1.8, 1.0), strict=True):
        rows += [
            row(case.name, "jpd", ours, flops=case.flops),
            row(case.name, "cublas", theirs, flops=case.flops),
        ]
    summary = flat_gemm.summarise(rows, cases)
    assert summary["geomean_vs_cublas_m_le_64"] == pytest.approx(math.sqrt(1.5 * 0.9))
    assert summary["min_vs_cublas_m_le_64"] == pytest.approx(0.9)
    assert summary["geomean_vs_cublas_m128"] == pytest.approx(0.25)
    dense = dense_gemm.summarise(rows, cases)
    assert dense["geomean_vs_cublas"] == pytest.approx((1.5 * 0.9 * 0.25) ** (1 / 3))
    assert rows[0]["tflops"] == pytest.approx(cases[0].flops / 1e6)


def test_prefill_and_dataflow_summaries():
    rows = [row("a", "jpd", 2.0), row("a", "flashinfer", 3.0), row("a", "torch_cudnn", 1.9)]
    summary = prefill_attention.summarise(rows)
    assert summary["geomean_vs_best_peer"] == pytest.approx(0.95)
    rows = [
        row("llama M=1", "table", 4.0),
        row("llama M=1", "flat_gemm", 4.4),
        row("llama M=1", "cublas", 6.0),
        row("llama M=256", "table", 10.0),
        failed_row("llama M=256", "flat_gemm", "NotImplementedError: M is at most 128"),
        row("llama M=256", "xla", 9.0),
        row("llama M=2", "table", 4.0),
        row("llama M=2", "flat_gemm", 4.4),
        failed_row("llama M=2", "xla", "RuntimeError: it waited for the host"),
    ]
    summary = dataflow.summarise(rows)
    assert summary["gain_vs_static"] == pytest.approx({"llama M=1": 1.1, "llama M=256": 0.9})
    because = {"llama M=2": "xla failed: RuntimeError: it waited for the host"}
    assert summary["no_gain_because"] == because
    assert summary["min_gain_vs_static"] == pytest.approx(0.9)
    assert summary["geomean_vs_cublas"] == pytest.approx(1.5)


def test_share_summary_counts_what_is_wrong():
    rows = [
        row("flat_gemm @ 100 %", "jpd", 5.0, rel_err=0.002),
        failed_row("flat_gemm @ 60 %", "jpd", "relative error", wrong_by=0.3),
        make_row("flat_gemm @ 60 %", "cublas", rel_err=0.45),
        failed_row("flat_gemm @ 50 %", "cublas", "the result is not finite"),
        failed_row("flat_gemm @ 40 %", "jpd", "hung", share=40),
        failed_row("dense_gemm @ 40 %", "jpd", "hung", share=40),
        failed_row("flat_gemm @ 40 %", "cublas", "hung", share=40),
        failed_row("flat_gemm @ 30 %", "cublas", "hung", share=30),
        skipped_row("flat_gemm @ 10 %", "jpd"),
    ]
    summary = sm_shares.summarise(rows)
    assert summary["max_rel_err"] == pytest.approx(0.3)
    assert summary["cublas_max_rel_err"] == pytest.approx(0.45)
    assert (summary["hangs"], summary["cublas_hangs"]) == (1, 2)
    assert (summary["jpd_failed"], summary["cublas_not_finite"]) == (3, 1)
    assert summary["shares"] == "1 of 19"


def test_a_model_on_a_share_may_differ_by_a_near_tie_only():
    whole = {"tokens": [[1, 2, 3]], "logprobs": [[-5.0, -5.0, -5.0]]}
    ended = sm_shares.Ended(0, "", cut=False)
    compare = partial(sm_shares.compare_model, "m", ended=ended)
    tie = {"tokens": [[1, 7, 9]], "logprobs": [[-5.01, -5.02, -8.0]], "step_us": 9.0}
    good = compare(tie, whole)
    assert good["status"] == "ok"
    assert good["tokens_agree"] == pytest.approx(1 / 3)
    assert good["logprob_diff"] == pytest.approx(0.02)
    wrong = {"tokens": [[4, 4, 4]], "logprobs": [[-3.0, -3.0, -3.0]], "step_us": 9.0}
    assert "differ by 2" in compare(wrong, whole)["status"]
    assert compare({"error": "no engine"}, whole)["status"] == "failed: no engine"
    assert compare(tie | {"error": "late"}, whole)["status"] == "failed: late"


# --- references -----------------------------------------------------------------------------


def dense_attention(q, k, v):
    """float64 attention of one query: q `[Hq, D]`, k and v `[T, Hkv, D]`."""
    group = q.shape[0] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("hd,thd->ht", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v)


def test_both_references_are_attention():
    case = Decode(3, 4, 2, 40, ragged=True)
    problem = share_problems.decode(case)
    a = problem.arrays
    for i, length in enumerate(case.lengths):
        pages = a["table"][i, : -(-length // PAGE_TOKENS)]
        k, v = (a[name][pages].reshape(-1, 2, 128)[:length].astype(np.float64) for name in "kv")
        want = dense_attention(a["q"][i].astype(np.float64), k, v)
        assert np.abs(problem.want[i] - want).max() < 1e-5
    got = paged_rows(
        *(jnp.asarray(a[name]) for name in ("q", "k", "v", "table", "lengths")), scale=128**-0.5
    )
    assert worst_row_error(got, problem.want) < 1e-5


def test_prefill_problem_is_causal():
    case = Prefill(4, 2, ((5, 0), (3, 4)))
    problem = share_problems.prefill(case)
    a = problem.arrays
    pages = a["table"][1]
    k, v = (a[name][pages].reshape(-1, 2, 128)[:6].astype(np.float64) for name in "kv")
    want = dense_attention(a["q"][6].astype(np.float64), k, v)  # second token of the second chunk
    got = problem.want[problem.rows.tolist().index(6)]
    assert np.abs(got - want).max() < 1e-5


def test_errors_are_of_the_worst_row_and_catch_nan():
    want = np.ones((3, 4), np.float32)
    got = want.copy()
    got[1] *= 1.5
    assert worst_row_error(got, want) == pytest.approx(0.5)
    got[2, 0] = np.nan
    assert worst_row_error(got, want) == float("inf")


def test_problems_survive_a_file(tmp_path):
    problem = share_problems.gemm(3, 64, 32)
    share_problems.save(problem, tmp_path / "p.npz")
    again = share_problems.load(tmp_path / "p.npz")
    assert again.arrays["x"].dtype == share_problems.BF16
    assert np.array_equal(again.arrays["w"], problem.arrays["w"])
    assert np.array_equal(again.want, problem.want)
    x, w = (problem.arrays[name].astype(np.float64) for name in ("x", "w"))
    assert worst_row_error(problem.want, (x @ w.T)[problem.rows]) < 1e-5


@pytest.mark.parametrize("name", ["rms_norm quick", "rope_write quick", "flat_gemm quick"])
def test_problems_call_the_kernels_as_they_are(name):
    """Shapes only: what the kernels compute is tested with them."""
    pytest.importorskip(f"pallas_kernels.{share_problems.kernel_of(name)}.kernel")
    problem = share_problems.QUICK_PROBLEMS[name]()
    op, large = share_problems.call(name, {})
    specs = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in problem.arrays.items()}
    own = {k: specs.pop(k) for k in large}
    out = jax.eval_shape(op, specs, own)
    assert out.shape[1:] == problem.want.shape[1:]
    assert out.shape[0] > problem.rows.max()


# --- timing ---------------------------------------------------------------------------------


def test_operands_rotate_through_more_than_the_cache():
    assert device_time.rotations(33_554_432) == 12
    assert device_time.ROTATED_BYTES < 12 * 33_554_432
    assert device_time.rotations(10**9) == 8
    assert device_time.rotations(1) == 64


def test_a_chain_keeps_every_call():
    op = product("xla")
    x, ws = jnp.ones((2, 32)), [jnp.full((16, 32), float(i)) for i in range(5)]
    chain = device_time.Chain(op, x, ws[0], len(ws))
    compiled = device_time.compile_chains({"key": lambda: chain})["key"]
    assert compiled.calls == 5
    outs = compiled.programs["stream"](x, ws)
    assert [float(y[0, 0]) for y in outs] == [32.0 * i for i in range(5)]
    assert float(compiled.first_output(x, ws)[0, 0]) == 0.0
    assert len(device_time.measure(compiled, x, ws).samples) == 1
    # One lowered function that is called, not five copies of its body.
    assert chain.lower().as_text().count("call @") == 5


def test_a_chain_that_does_not_compile_is_its_error():
    def refuse(x, w):
        raise NotImplementedError("not for these shapes")

    x = jnp.ones((2, 2))
    chains = {
        "bad": lambda: device_time.Chain(refuse, x, x, 2),
        "good": lambda: device_time.Chain(lambda a, b: a + b, x, x, 2),
    }
    done = device_time.compile_chains(chains)
    assert isinstance(done["bad"], NotImplementedError)
    assert done["good"].calls == 2


def test_kernel_times_come_from_the_gpu_streams():
    text = """
      planes { name: "/device:GPU:0"
        lines { name: "Stream #14(Compute)"
          events { metadata_id: 1 duration_ps: 5000000 }
          events { metadata_id: 2 duration_ps: 7000000 } }
        lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000 } }
        event_metadata { key: 1 value { id: 1 name: "mosaic_gpu_decode" } }
        event_metadata { key: 2 value { id: 2 name: "memset" } } }
      planes { name: "/host:CPU" lines { name: "Stream #1" events { metadata_id: 1 } }
        event_metadata { key: 1 value { id: 1 name: "mosaic_gpu_decode" } } }
    """
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    profile = jax.profiler.ProfileData.from_serialized_xspace(serialized)
    assert device_time.kernel_times_us(profile, "mosaic") == [5.0]
    assert sorted(device_time.kernel_times_us(profile, ".")) == [5.0, 7.0]


# --- processes ------------------------------------------------------------------------------


def test_a_baseline_that_leaves_nothing_is_failed_rows(tmp_path):
    report = Report("x", "?", out=tmp_path)
    run_peer(report, "no_such_baseline", [], [("a", "peer")])
    assert report.rows[0]["status"].startswith("failed: the baseline exited with 1")


def test_command_lines_of_the_baselines():
    args = torch_gemm.parse_args(["--case", "1:64:64", "--layer", "tiny:2", "--gemlite"])
    assert torch_gemm.keys_of(args) == [
        ("64x64 M=1", "cublas"),
        ("64x64 M=1", "gemlite"),
        ("tiny M=2", "cublas"),
    ]
    args = torch_attention.parse_args(["--kind", "decode"])
    assert all(not case.ragged for case in args.cases)
    with pytest.raises(SystemExit):
        flashinfer_attention.parse_args(["--modes", "fa9"])


def test_a_process_that_hangs_is_stopped():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert mps.run_bounded(command, {}, 0.5)[0] is None
    command = [sys.executable, "-c", "import sys; sys.exit('why')"]
    status, text = mps.run_bounded(command, {}, 600)
    assert (status, text.strip()) == (1, "why")


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_hangs_loses_its_work_before_it_is_stopped(fails):
    terminated = []

    class Daemon:
        def terminate_client(self, pid):
            os.kill(pid, 0)
            terminated.append(pid)
            if fails:
                raise MpsError("no answer")

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert mps.run_bounded(command, {}, 0.5, Daemon())[0] is None
    assert len(terminated) == 1


@pytest.mark.parametrize("name", ["flat_gemm", "dense_gemm"])
def test_quick_mode_runs_on_a_cpu(name, tmp_path):
    pytest.importorskip(f"pallas_kernels.{name}.kernel")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--no-peers"]
    command += ["--rows", "8", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    rows = load(tmp_path / f"{name}.json")["rows"]
    assert {r["impl"] for r in rows} == {"jpd", "xla"}
    assert all(r["mode"] == "interpreted" for r in rows if r["impl"] == "jpd")


@pytest.mark.parametrize("name", ["flat_gemm", "dense_gemm"])
def test_rows_of_another_implementation_are_not_merged_under_one_name(name, tmp_path):
    doc = load(ROOT / f"benchmarks/results/h200/{name}.json")
    others = {"table": "dense_gemm", "dense_gemm": "table"}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--seconds", "0", "--merge"]
    command += [ROOT / f"benchmarks/results/h200/{name}.json", "--out", str(tmp_path), "--impl"]
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=600)
    impl = doc["summary"]["impl"]
    refused = run([*command, others[impl]])
    assert refused.returncode == 2
    assert f"the merged rows are of --impl {impl}" in refused.stderr
    assert run([*command, impl]).returncode == 0
    assert load(tmp_path / f"{name}.json")["summary"]["impl"] == impl


def test_benchmarks_start_without_jax():
    """A baseline runs first, with the device's memory all free: importing must not start JAX."""
    names = ["decode_attention", "prefill_attention", "flat_gemm", "dense_gemm", "dataflow"]
    modules = ", ".join(f"benchmarks.{name}" for name in [*names, "sm_shares"])
    code = f"import sys, {modules}; sys.exit('jax._src.xla_bridge' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=600)
    assert done.returncode == 0
