"""Writes the README's tables of results from the stored files: `python -m benchmarks.readme`.

What stands between the two marks of `README.md` is generated; `tests/test_readme.py` fails where it
is not what the files say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import serving_impls
from benchmarks.serving_summary import VS_BEST_UNIFIED

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- results: written by `python -m benchmarks.readme` -->"
END = "<!-- end of results -->"

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    file: str
    what: Callable[[Summary], str] | str
    measured: Callable[[Summary], str]
    aim: str


def _over(summary: Summary, key: str) -> str:
    """Of how many cases a number is."""
    return summary.get(f"{key}_over") or "all"


_MODELS = {"llama2-7b": "Llama-2-7B", "llama31-8b": "Llama-3.1-8B"}


def _gains(summary: Summary) -> str:
    """The table's gain over the best single implementation, by model and rows."""
    of_model: dict[str, list[str]] = {}
    for case, gain in summary["gain_vs_static"].items():
        model, rows = case.split(" M=")
        of_model.setdefault(_MODELS.get(model, model), []).append(f"{rows}: {gain:.2f}×")
    gains = [f"{model} {', '.join(found)}" for model, found in of_model.items()]
    return "; ".join(gains + [f"none for {case}" for case in summary["no_gain_because"]])


_BOUNDS = {"=": "", "<": "below ", "<=": "at most ", ">": "above ", ">=": "at least "}


def _ratio(found: Summary, key: str) -> str:
    """A ratio of goodputs, which is a bound where a load was missing to find one of them."""
    relation, ratio = found["relations"].get(key, "="), found[key]
    if relation != "=":
        ratio = (math.floor if relation[0] == ">" else math.ceil)(100 * ratio) / 100
    return f"{_BOUNDS[relation]}{ratio:.2f}×"


def _speedups(found: Summary) -> str:
    """Of mean end-to-end time, where it was measured."""
    at = {"max": "at best", "at_80pct_load": "at 80 % load"}
    values = {of: found[f"mean_e2e_speedup_{of}"] for of in at}
    return ", ".join(f"{x:.2f}× {at[of]}" for of, x in values.items() if x is not None)


def _goodputs(found: Summary) -> str:
    """Of one implementation over those of the others, where it was measured."""
    others = {
        "goodput_vs_chunked": "chunked",
        "goodput_vs_prefill_first": "prefill-first",
        "goodput_dynamic_vs_100_100": "of (100, 100)",
        VS_BEST_UNIFIED: "of the best unified policy",
    }
    known = [key for key in others if found.get(key) is not None]
    ratios = ", ".join(f"{_ratio(found, key)} {others[key]}" for key in known)
    return ratios and f"goodput {ratios}"


def _ahead(found: Summary) -> str:
    """What the controllers gain in one order of prompts, and whether `auto` took the better one."""
    without_slo, auto = found["without_slo"], found["auto_vs_better_min"]
    said = _speedups(found)
    if without_slo["mean_e2e_speedup_max"] is not None:
        said = f"{said} (aimed at no SLO {_speedups(without_slo)})".strip()
    said = ", ".join(text for text in (said, _goodputs(found)) if text)
    if auto is None:
        return said
    best = f"`auto` at least {auto:.2f}× the best of that controller and those policies"
    return f"{said}; {best}" if said else best


def _served_one(found: Summary) -> str:
    """What semi-PD gains on a workload."""
    shortest, parts = found.get("shortest"), []
    if ahead := _ahead(found):
        parts.append(f"in order of arrival {ahead}")
    parts += _autos(found, "in order of arrival")
    if shortest is None:
        return "; ".join(parts)
    if ahead := _ahead(shortest):
        parts.append(f"with short prompts first, those policies in either order, {ahead}")
    return "; ".join(parts + _autos(shortest, "with short prompts first"))


def _autos(found: Summary, order: str) -> list[str]:
    """What `auto` gains in one order of prompts."""
    parts = {impl: auto for impl, auto in found.items() if impl.startswith("auto")}
    return [f"{_auto(i)} {order}: {_gained(a)}" for i, a in parts.items() if isinstance(a, dict)]


def _auto(impl: str) -> str:
    """What an implementation whose name begins with `auto` is."""
    plain, tokens, _ = serving_impls.parts(impl)
    aim = "no SLO" if plain == serving_impls.AUTO_MEAN else "the tight SLO"
    steps = "" if tokens is None else f" and mixed steps of {tokens} tokens"
    return f"`auto` with {aim}{steps}"


def _gained(found: Summary) -> str:
    """Mean end-to-end time and goodput, where they were measured."""
    return ", ".join(text for text in (_speedups(found), _goodputs(found)) if text)


def _served(workload: str, aim: str = "as above", run: str = "", more: str = "") -> Line:
    """The row of semi-PD on a workload.

    Args:
        workload: its name.
        aim: of the issue.
        run: end of the file's name.
        more: about that run.
    """
    return Line(
        f"h200/semi_pd_serving{run}.json",
        f"serving Llama-3.1-8B by semi-PD, {workload}{more}: mean end-to-end time of the best "
        "unified policy over that of the controller with the tight SLO; its goodput over others'",
        lambda s: _served_one(s[workload]),
        aim,
    )


def _pause(s: Summary, kind: str, what: str) -> str:
    """Of running requests, with a switch and in the controls without: median and p99."""
    switch, control = (
        [f"{s[f'{kind}_{of}pause_p{q}_ms']:.0f}" for q in (50, 99)] for of in ("", "control_")
    )
    return (
        f"to {what} ({s[f'{kind}_switches']} switches) p50 {switch[0]} ms, p99 {switch[1]} ms, "
        f"without a switch {control[0]} and {control[1]} ms"
    )


def _recoveries(s: Summary, kind: str) -> str:
    """Of each phase, in seconds."""
    return ", ".join(
        f"{phase} after {s[f'{kind}_{phase}_recovery_p50_ms'] / 1e3:.2g} s in the median, at most "
        f"{s[f'{kind}_{phase}_recovery_max_ms'] / 1e3:.2g}"
        for phase in ("prefill", "decode")
    )


def _simulated(s: Summary) -> str:
    """Errors of the simulator, for each implementation that was compared."""
    end = "_ttft_error_pct_max"

    def name(impl: str) -> str:
        of = impl.removesuffix("_shortest")
        if of.startswith("semi_pd_"):
            shown = f"({of.removeprefix('semi_pd_').replace('_', ', ')})"
        else:
            shown = of.replace("_", "-")
        return shown if of == impl else f"{shown}, short prompts first"

    def errors(impl: str, part: str) -> str:
        key = f"{impl}_{part}_error_pct"
        return f"{s[f'{key}_max']:.0f} % ({s[f'{key}_mean']:.0f})"

    impls = [key.removesuffix(end) for key in s if key.endswith(end)]
    return "; ".join(f"{name(i)} {errors(i, 'ttft')}, {errors(i, 'tpot')}" for i in impls)


def _overlapped(link: str) -> Callable[[Summary], str]:
    """FlashOverlap on one kind of link."""

    def text(s: Summary) -> str:
        of_bound = s[f"{link}_pct_of_bound_median"]
        names = {"xla": "XLA", "cupy": "cupy", "torch": "torch"}
        peers = [names[peer] for peer in names if f"{link}_geomean_vs_{peer}" in s]
        found = (
            f"{s[f'{link}_geomean_speedup']:.2f}× cuBLAS and then NCCL, the fastest measured (by "
            f"{', '.join(peers)}), in geometric mean, {s[f'{link}_min_speedup']:.2f}× at worst, "
            f"{s[f'{link}_max_speedup']:.2f}× at best; median {of_bound:.0f} % of the paper's bound"
        )
        if f"{link}_rows_geomean_speedup" in s:
            found += (
                "; with the rows put in order, too, which the next norm does else, "
                f"{s[f'{link}_rows_geomean_speedup']:.2f}×, "
                f"{s[f'{link}_rows_min_speedup']:.2f}× at worst"
            )
        peer = s.get(f"{link}_geomean_vs_torch_async_tp")
        if peer is not None:
            found += f"; {peer:.2f}× PyTorch's async TP, which has reduce-scatter only"
        return found

    return text


def _prefills(summary: Summary) -> str:
    """Speed-ups of whole prefills by the number of GPUs and tokens."""
    found = []
    for key, gain in sorted(summary.items()):
        ranks, _, tokens = key.partition("_speedup_at_")
        if tokens:
            text = f"{gain:.2f}× for {int(tokens):,} tokens on {ranks[2:]} GPUs"
            found.append((int(tokens), text))
    return ", ".join(text for _, text in sorted(found))


LINES = (
    Line(
        "h200/decode_attention.json",
        lambda s: f"decode attention, batch 1-128, context 512-32k, {s['cases']} cases",
        lambda s: (
            f"{s['geomean_vs_best_peer']:.2f}× the faster of torch SDPA (best backend) and "
            f"FlashInfer (best mode) in geometric mean, worst case {s['min_vs_best_peer']:.2f}×; "
            f"with 500 MB of KV and more ({_over(s, 'pct_of_bw_large')} such cases) at "
            f"{s['pct_of_bw_large']:.0f} % of a device copy's rate "
            f"({s['copy_bytes_per_s'] / 1e12:.2f} TB/s)"
        ),
        "1.10×, 0.97×, 97 %",
    ),
    Line(
        "h200/decode_attention.json",
        "the same, asynchronous against synchronized softmax",
        lambda s: (
            f"{s['async_speedup_geomean']:.2f}× in geometric mean, at best "
            f"{s['async_speedup_max']:.2f}×"
        ),
        "the paper's 1.14×",
    ),
    Line(
        "h200/flat_gemm.json",
        lambda s: (
            "products of 1-64 rows by the table (GEMV, flat or dense GEMM) of four models, "
            f"{_over(s, 'geomean_vs_cublas_m_le_64')} cases"
        ),
        lambda s: (
            f"{s['geomean_vs_cublas_m_le_64']:.2f}× cuBLAS in geometric mean, worst case "
            f"{s['min_vs_cublas_m_le_64']:.2f}×; by rows: "
            + ", ".join(f"{m}: {s[f'geomean_vs_cublas_m{m}']:.2f}×" for m in (1, 2, 8, 16, 32, 64))
            + f"; 128: {s['geomean_vs_cublas_m128']:.2f}×"
        ),
        "1.20×, 0.98×",
    ),
    Line(
        "h200/dense_gemm.json",
        lambda s: (
            f"dense GEMM, 256-8192 rows, {s['cases']} cases"
            + (", without a table" if s["impl"] == "dense_gemm" else "")
        ),
        lambda s: (
            f"{s['geomean_vs_cublas']:.2f}× cuBLAS in geometric mean, worst case "
            f"{s['min_vs_cublas']:.2f}×; by rows: "
            + ", ".join(
                f"{m}: {s[f'geomean_vs_cublas_m{m}']:.2f}×"
                for m in (256, 512, 1024, 2048, 4096, 8192)
            )
        ),
        "0.95×",
    ),
    Line(
        "h200/prefill_attention.json",
        lambda s: (
            "causal attention of 1k-16k tokens, also after a prefix, "
            f"{_over(s, 'geomean_vs_best_peer')} cases"
        ),
        lambda s: (
            f"{s['geomean_vs_best_peer']:.2f}× the fastest of cuDNN, torch SDPA (best backend) and "
            f"FlashInfer (best of FA3, FA2) in geometric mean, worst case "
            f"{s['min_vs_best_peer']:.2f}×; of each: {s['geomean_vs_torch_cudnn']:.2f}×, "
            f"{s['geomean_vs_torch_sdpa']:.2f}×, {s['geomean_vs_flashinfer']:.2f}×"
        ),
        "0.95×",
    ),
    Line(
        "h200/dataflow.json",
        lambda s: (
            "all products of a layer by the table's choices, against the best of flat GEMM only, "
            "dense GEMM only, XLA only and cuBLAS (torch) only, by rows"
        ),
        _gains,
        "above 1.0×",
    ),
    Line(
        "h200/decode_step.json",
        "decode step of Llama-2-7B, batch 1, context 512, wall time of the engine's own loop",
        lambda s: (
            f"{s['ms_b1']:.2f} ms, {s['pct_of_bound_b1']:.0f} % of reading weights and KV once at "
            f"a copy's rate; {s['speedup_vs_hf_eager_b1']:.1f}× Hugging Face eager, "
            f"{s['speedup_vs_hf_static_b1']:.2f}× its compiled static cache, "
            f"{s['speedup_vs_xla_b1']:.2f}× jpd with every op in XLA"
        ),
        "3.5 ms, 88 %, 4.3×, 1.7×",
    ),
    Line(
        "h200/decode_step.json",
        "the same, batch 32, context 1024",
        lambda s: (
            f"{s['ms_b32']:.2f} ms, {s['pct_of_bound_b32']:.0f} %; "
            f"{s['speedup_vs_hf_eager_b32']:.1f}× Hugging Face eager, "
            f"{s['speedup_vs_hf_static_b32']:.2f}× its compiled static cache, "
            f"{s['speedup_vs_xla_b32']:.2f}× jpd with every op in XLA"
        ),
        "85 %",
    ),
    Line(
        "h200/sm_shares.json",
        lambda s: f"kernels under MPS shares of the SMs, {s['shares']} shares",
        lambda s: (
            f"relative error at most {s['max_rel_err']:.4f}, {s['hangs']} hangs, {s['jpd_failed']} "
            f"cases failed; log-probabilities of two layers of Llama-3.1-8B differ by at most "
            f"{s['model_max_logprob_diff']:.3f} from those on all SMs; cuBLAS' error is up to "
            f"{s['cublas_max_rel_err']:.2f}"
        ),
        "0.01",
    ),
    Line(
        "h200/hf_parity.json",
        lambda s: (
            f"greedy tokens of {s['models']} small models in bfloat16 on the kernels, that in the "
            f"box and random ones of each family, {s['tokens']:,} tokens judged by transformers in "
            "float32"
        ),
        lambda s: (
            f"{100 * s['top1_agreement']:.1f} % are float32's own choice (of transformers in "
            f"bfloat16: {100 * s['hf_bf16_top1_agreement']:.1f} %), {s['wrong_tokens']} wrong "
            "beyond rounding"
        ),
        "0 wrong",
    ),
    Line(
        "h200/semi_pd_memory.json",
        "GPU memory of semi-PD beyond one process, Llama-3.1-8B, two executors",
        lambda s: (
            f"{s['extra_gb']:.2f} GB; weights ({s['weights_gb']:.1f} GB) held "
            f"{s['weights_counted']} time"
            + (
                f"; four executors (`auto`) {s['auto_extra_gb']:.2f} GB"
                if "auto_extra_gb" in s
                else ""
            )
        ),
        "2.5 GB",
    ),
    Line(
        "h200/semi_pd_switch.json",
        lambda s: (
            "pause of running requests at a change of shares, 64 running and prompts arriving, "
            "Llama-3.1-8B, against as long a time without one"
        ),
        lambda s: (
            f"{_pause(s, 'pool', 'kept executors')}; "
            f"{_pause(s, 'background', 'ones started in the background')}; hand-over of a request "
            f"to decode p50 {s['hand_over_p50_ms']:.0f} ms, p99 {s['hand_over_p99_ms']:.0f} ms, "
            f"{s['hand_over_kv_bytes_copied']} bytes of KV copied"
        ),
        "p99 15 ms, 15 ms",
    ),
    Line(
        "h200/semi_pd_parity.json",
        lambda s: (
            "greedy tokens in bfloat16, judged by one executor with chunked prefill: of one with "
            "either policy, and of semi-PD, each phase on 100 or 50 % of the SMs, drawn every "
            f"second ({s['switches']} changes of executors, {s['kills']} executors killed), "
            "Llama-3.1-8B, random weights"
        ),
        lambda s: (
            f"{s['wrong']} wrong, {s['not_run']} engines not run; of {s['compared_tokens']:,} "
            f"tokens {100 * s['ties'] / s['compared_tokens']:.1f} % are another one within "
            f"{s['tie_below']} of the best's log-probability"
        ),
        "0 wrong",
    ),
    Line(
        "h200/semi_pd_crash.json",
        lambda s: (
            f"{s['kills']} executors killed under load, Llama-3.1-8B, 64 running, judged by the "
            "same engine undisturbed"
        ),
        lambda s: (
            f"{s['requests_lost']} requests lost, {s['wrong']} with a wrong token, "
            f"{s['pages_leaked']} pages leaked; the next token where a process has to start: "
            f"{_recoveries(s, 'cold')}; where another is ready: {_recoveries(s, 'warm')}"
        ),
        "0, 0, 0",
    ),
    Line(
        "h200/sm_share_surface.json",
        "steps of prefill (2,048 tokens) and decode (32 and 64 rows, context 1,024) side by side, "
        "against the same shares alone, Llama-3.1-8B",
        lambda s: (
            f"prefill takes up to {s['prefill_max_slowdown_beside']:.2f}×, decode up to "
            f"{s['decode_max_slowdown_beside']:.2f}×; mean error, on these very steps, "
            "of jpd's models "
            f"{100 * s['prefill_model_mean_error']:.0f} % and "
            f"{100 * s['decode_model_mean_error']:.0f} %, of the paper's (steps alone) "
            f"{100 * s['paper_prefill_mean_error']:.0f} % and "
            f"{100 * s['paper_decode_mean_error']:.0f} %"
        ),
        "",
    ),
    _served("azure_conv", "1.27× on two workloads; goodput 1.55×, 1.72×, 1.11×"),
    _served("azure_code"),
    _served("arxiv"),
    _served("sharegpt_like"),
    _served(
        "azure_conv",
        run="_mixed_tokens",
        more=" once more, with later controllers; chunked prefill also with 1024 and, short "
        "prompts first, 512 tokens in a mixed step in place of 2048",
    ),
    _served(
        "azure_code",
        run="_mixed_tokens",
        more=" once more, with later controllers; chunked prefill also with 1024 tokens in a "
        "mixed step, short prompts first",
    ),
    Line(
        "cpu/simulated_serving.json",
        "the same workloads by `jpd simulate`, which is fitted to single steps and not to them: "
        "error of mean TTFT and TPOT, over the rates, at most (mean)",
        _simulated,
        "15 %",
    ),
    Line(
        "h200/simulator_fidelity.json",
        "`jpd simulate` fitted to the steps of a served rate, 8 requests/s, against that, 4 and 12 "
        "(0.2 to 0.5 of what one executor keeps up with), azure_conv, chunked prefill and "
        "(100, 100)",
        lambda s: (
            f"mean TTFT off by at most {s['ttft_error_pct_max']:.1f} %, TPOT "
            f"{s['tpot_error_pct_max']:.1f} %, end-to-end time {s['e2el_error_pct_max']:.1f} %"
        ),
        "15 %",
    ),
    Line(
        "h200/overlap.json",
        lambda s: (
            f"product and collective overlapped, 4 GPUs, NVLink, "
            f"{_over(s, 'nvlink_geomean_speedup')} cases"
        ),
        _overlapped("nvlink"),
        "never < 0.98×, 1.30× at best, 85 %",
    ),
    Line(
        "h200/overlap.json",
        lambda s: f"the same without P2P, {_over(s, 'no_p2p_geomean_speedup')} cases",
        _overlapped("no_p2p"),
        "never < 0.98×, 1.45× at best, 85 %",
    ),
    Line(
        "h200/overlap.json",
        lambda s: f"its GEMM, which signals, alone, {_over(s, 'gemm_vs_cublas_geomean')} shapes",
        lambda s: (
            f"{s['gemm_vs_cublas_geomean']:.2f}× cuBLAS in geometric mean, worst "
            f"{s['gemm_vs_cublas_min']:.2f}×; signals cost {s['signal_cost_pct']:.1f} % "
            f"({_over(s, 'signal_cost_pct')} shapes)"
        ),
        "0.97×, 1 %",
    ),
    Line(
        "h200/overlap_tune.json",
        "time of an overlapped product, predicted against measured, mean error",
        lambda s: "; ".join(
            f"{s[f'{link}_tune_predictor_error_pct']:.1f} % {name} "
            f"({s[f'{link}_tune_plans_timed']} plans)"
            for link, name in (("nvlink", "with NVLink"), ("no_p2p", "without P2P"))
        ),
        "5 %",
    ),
    Line(
        "h200/overlap_model.json",
        lambda s: f"prefill of Llama-3-70B's shape, {s['tp4_layers']} layers, sums overlapped",
        lambda s: f"{_prefills(s)}, against the faster of XLA's products and ours, then the sum",
        "1.05× on 4 GPUs",
    ),
    Line(
        "h200/offline_throughput.json",
        "256 requests of the Azure 2023 conversation trace at once, Llama-2-7B, **before the "
        "kernels, every op in XLA**",
        lambda s: (
            f"{s['tokens_per_s']:,.0f} generated tokens/s, {s['total_tokens_per_s']:,.0f} with "
            f"prompts; GPU idle {100 * s['gpu_idle_share']:.2f} % of a traced window"
        ),
        "",
    ),
    Line(
        "cpu/host_overhead.json",
        "plan + commit of a decode step, 256 sequences, 2-core CPU",
        lambda s: (
            f"median {s['steady_median_ms']:.2f} ms, p99 {s['steady_p99_ms']:.2f} ms (with "
            f"admissions {s['churn_median_ms']:.2f} and {s['churn_p99_ms']:.2f})"
        ),
        "",
    ),
)


def table() -> str:
    """The table of all lines, in Markdown."""
    out = ["| what | measured | aim | file |", "|---|---|---|---|"]
    for line in LINES:
        summary = json.loads((RESULTS / line.file).read_text())["summary"]
        what = line.what if isinstance(line.what, str) else line.what(summary)
        link = f"[{Path(line.file).stem}](benchmarks/results/{line.file})"
        out.append(f"| {what} | {line.measured(summary)} | {line.aim} | {link} |")
    return "\n".join(out)


def rewritten(readme: str) -> str:
    """The README with the table as the files have it."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    main()
