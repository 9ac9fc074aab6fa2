"""The arithmetic of the semi-PD benchmarks, on made-up rows and steps."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    curves,
    semi_pd_crash,
    semi_pd_memory,
    semi_pd_parity,
    semi_pd_serving,
    semi_pd_switch,
    serving_impls,
    serving_summary,
    share_fits,
    simulator_fidelity,
    sm_share_surface,
)
from benchmarks.engine_load import LoadRequest, LoggedStep
from benchmarks.report import Report
from benchmarks.rows import load as load_document
from benchmarks.token_parity import PIECE, Parity, Said, verify
from jpd.bench.slo import Goodput, RequestRecord, Slo
from jpd.engine.lane import Switch
from jpd.semi_pd.controller import Shares
from jpd.semi_pd.share_models import (
    H200,
    decode_curve,
    overlap_wait,
    prefill_beside,
    prefill_curve,
)
from jpd.simulate.fit import MeasuredStep, StepTimes

SURFACE = "How long do prefill and decode steps take under each SM share, alone and side by side?"

# --- tokens ----------------------------------------------------------------------------------


class Scripted:
    """A reference that says the same at a position whatever was there before."""

    def __init__(self, *steps: dict[int, float]) -> None:
        self.steps = [Said(max(step, key=step.get), step) for step in steps]
        self.rounds: list[list[LoadRequest]] = []

    def __call__(self, requests: list[LoadRequest]) -> list[list[Said]]:
        self.rounds.append(requests)
        starts = [len(request.prompt) - 1 for request in requests]  # prompts are of one token
        ends = [a + r.output_tokens for a, r in zip(starts, requests, strict=True)]
        return [self.steps[a:b] for a, b in zip(starts, ends, strict=True)]


def check(said: Scripted, *got: list[int], tie_below: float) -> Parity:
    """Of requests that ask for as many tokens as are said."""
    return verify(said, [LoadRequest([0], len(said.steps))] * len(got), got, tie_below)


def test_identical_ties_and_wrong_tokens() -> None:
    said = Scripted({1: -0.1, 2: -3.0}, {3: -0.50, 4: -0.55, 5: -0.7}, {6: -0.1, 7: -0.15})
    found = check(said, [1, 3, 6], [1, 4, 7], [1, 5, 6], [2, 3, 6], [1, 3, 7], tie_below=0.1)
    assert (found.identical, found.ties, found.wrong) == (1, 3, 2)
    assert found.compared_tokens == 3 + 3 + 2 + 1 + 3
    assert found.faults[0] == "request 2, position 1: token 5, not 3, margin 0.2"
    # After a tie it goes on from the other text.
    assert said.rounds[1:] == [[LoadRequest([0, 1, 4], 1)]]


def test_a_wrong_token_after_a_tie_is_found() -> None:
    said = Scripted({1: -0.50, 2: -0.55}, {3: -0.1, 4: -3.0})
    found = check(said, [2, 4], tie_below=0.1)
    assert (found.identical, found.ties, found.wrong) == (0, 1, 1)
    assert found.faults[0] == "request 0, position 1: token 4, not 3, margin 2.9"


def test_rounds_after_the_first_are_short() -> None:
    steps = [{1: -0.1, 2: -0.15}, *({3: -0.1} for _ in range(PIECE + 5))]
    said = Scripted(*steps)
    found = check(said, [2] + [3] * (PIECE + 5), [1] + [3] * (PIECE + 5), tie_below=0.1)
    assert (found.identical, found.ties, found.wrong) == (1, 1, 0)
    assert found.compared_tokens == 2 * len(steps)
    asked = [[r.output_tokens for r in requests] for requests in said.rounds]
    assert asked == [[PIECE + 6] * 2, [PIECE], [5]]


def test_without_a_threshold_nothing_is_a_tie() -> None:
    assert check(Scripted({1: -0.5, 2: -0.5}), [2], tie_below=0.0).wrong == 1


def test_what_the_reference_does_not_judge_is_wrong() -> None:
    work, got = [LoadRequest([0], 2)] * 2, [[1, 3], [1, 3]]
    found = verify(lambda requests: [[Said(1, {1: -0.1})], []], work, got, 0.1)
    assert (found.identical, found.ties, found.wrong) == (0, 0, 2)
    assert found.faults[0] == "request 0, position 0: the reference gave 1 of 2 tokens"


def test_tokens_that_are_missing_or_unheard_of_are_wrong() -> None:
    said = Scripted({1: -0.1, 2: -0.2}, {3: -0.1, 4: -0.2})
    found = check(said, [1], [1, 3, 5], [1, 99], tie_below=5.0)
    assert (found.identical, found.ties, found.wrong) == (0, 0, 3)
    assert found.faults[0] == "request 0: 1 tokens, not 2"
    assert found.faults[2] == "request 2, position 1: token 99, not 3, margin 0.1 or more"


def test_parity_summary_counts_engines_that_did_not_run() -> None:
    ran = {"identical": 5, "ties": 1, "wrong": 0, "compared_tokens": 60}
    more = {"switches": 7, "mode_changes": 3, "kills": 2, "wrong": 1}
    rows = [ran, ran | more, {"status": "failed: x"}]
    assert semi_pd_parity.summarise(rows) == {
        "identical": 10,
        "ties": 2,
        "wrong": 1,
        "compared_tokens": 120,
        "switches": 7,
        "mode_changes": 3,
        "kills": 2,
        "not_run": 1,
    }


# --- serving ---------------------------------------------------------------------------------


def point(impl: str, rate: float, e2e_ms: float, tight: float, seed: int = 0) -> dict[str, Any]:
    return {
        "workload": "w",
        "impl": impl,
        "rate": rate,
        "load": rate / 10,
        "seed": seed,
        "mean_e2el_ms": e2e_ms,
        "tight": tight,
        "loose": min(1.0, tight + 0.05),
    }


def points(**of: list[tuple[float, float, float]]) -> list[dict[str, Any]]:
    return [point(impl, *values) for impl, found in of.items() for values in found]


def test_summary_of_a_workload() -> None:
    rows = points(
        chunked=[(4, 100, 1.0), (6, 200, 0.95), (8, 500, 0.75), (10, 1000, 0.1)],
        prefill_first=[(4, 120, 1.0), (6, 300, 0.8), (8, 450, 0.5), (10, 900, 0.1)],
        semi_pd_100_100=[(4, 130, 1.0), (6, 180, 0.95), (8, 300, 0.85), (10, 600, 0.5)],
        semi_pd_dynamic=[(4, 125, 1.0), (6, 160, 0.98), (8, 250, 0.94), (10, 450, 0.54)],
    )
    found = serving_summary.summarise_workload(rows)
    # The better unified policy changes with the rate.
    assert found["mean_e2e_speedup_max"] == pytest.approx(2.0)
    assert found["mean_e2e_speedup_at_80pct_load"] == pytest.approx(450 / 250)
    # Speed-ups 0.8 at 4/s and 1.25 at 6/s.
    assert found["break_even_rate"] == pytest.approx(4 + 2 * 0.2 / 0.45)
    ours = 8 + 2 * 0.04 / 0.4
    assert found["goodput"]["semi_pd_dynamic"] == [pytest.approx(ours), "="]
    assert found["goodput_vs_chunked"] == pytest.approx(ours / (6 + 2 * 0.05 / 0.2))
    assert found["goodput_vs_prefill_first"] == pytest.approx(ours / 5)
    assert found["goodput_dynamic_vs_100_100"] == pytest.approx(ours / 7)
    assert found["loose"]["goodput_vs_chunked"] != found["goodput_vs_chunked"]
    assert found["goodput_vs_disaggregated_per_gpu"] is None
    assert set(found["null_because"]) == {
        "break_even_ratio",
        "auto_vs_better_min",
        "goodput_vs_disaggregated_per_gpu",
        "loose goodput_vs_disaggregated_per_gpu",
    }
    assert found["seed_spread"] is None
    assert "semi_pd_mean" in found["without_slo"]["null_because"]["mean_e2e_speedup_max"]
    faster = points(semi_pd_mean=[(4, 90, 0.5), (10, 300, 0.1)])
    without = serving_summary.summarise_workload([*rows, *faster])["without_slo"]
    assert without["mean_e2e_speedup_max"] == pytest.approx(3.0)
    part = 4 / 6  # of the way from load 0.4, with 100 / 90
    at_80 = (1 - part) * 100 / 90 + part * 3
    assert without["mean_e2e_speedup_at_80pct_load"] == pytest.approx(at_80)
    # Two GPUs that bear as much as one are worth half of it.
    rows += [row | {"impl": "disaggregated"} for row in rows if row["impl"] == "semi_pd_dynamic"]
    found = serving_summary.summarise_workload(rows)
    assert found["goodput_vs_disaggregated_per_gpu"] == pytest.approx(2.0)


def test_twins_with_short_prompts_first_are_compared_with_the_best_unified_policy() -> None:
    rows = points(
        chunked=[(4, 100, 1.0), (8, 500, 0.8)],
        prefill_first=[(4, 120, 1.0), (8, 450, 0.5)],
        semi_pd_dynamic=[(4, 125, 1.0), (8, 300, 0.9)],
    )
    assert "shortest" not in serving_summary.summarise_workload(rows)
    rows += points(
        chunked_shortest=[(4, 90, 1.0), (8, 400, 0.85)],
        semi_pd_dynamic_shortest=[(4, 80, 1.0), (8, 160, 0.95)],
    )
    found = serving_summary.summarise_workload(rows)
    # That changes nothing for the others.
    assert found["mean_e2e_speedup_max"] == pytest.approx(450 / 300)
    twins = found["shortest"]
    assert twins["mean_e2e_speedup_max"] == pytest.approx(2.5)
    assert twins["goodput_vs_chunked"] == pytest.approx(8 / 6)
    # Better at both rates: 1.125 and 2.5.
    assert twins["break_even_rate"] is None
    assert "from 4 on" in twins["null_because"]["break_even_rate"]
    again = twins["against_twins"]
    assert again["goodput_vs_chunked"] == pytest.approx(8 / (4 + 4 * 0.1 / 0.15))
    assert "prefill_first_shortest" in again["null_because"]["goodput_vs_prefill_first"]
    assert twins["relations"]["goodput_vs_chunked"] == ">="
    assert twins["goodput_dynamic_vs_100_100"] is None
    assert "semi_pd_mean_shortest" in twins["without_slo"]["null_because"]["mean_e2e_speedup_max"]
    faster = points(semi_pd_mean_shortest=[(8, 100, 0.1)])
    twins = serving_summary.summarise_workload([*rows, *faster])["shortest"]
    assert twins["without_slo"]["mean_e2e_speedup_max"] == pytest.approx(4.0)
    slower = points(semi_pd_mean_shortest=[(4, 100, 0.1), (8, 200, 0.1)])
    without = serving_summary.summarise_workload([*rows, *slower])["shortest"]["without_slo"]
    # 0.9 at 4/s, of chunked prefill's twin, and 2 at 8/s.
    assert without["break_even_rate"] == pytest.approx(4 + 4 * 0.1 / 1.1)
    assert without["relations"] == {"break_even_rate": "="}
    # A twin of a unified policy that was measured at some rates only counts there.
    some = [row for row in rows if (row["impl"], row["rate"]) != ("chunked_shortest", 4)]
    assert serving_summary.summarise_workload(some)["shortest"]["mean_e2e_speedup_max"] == 2.5
    assert serving_summary.summarise_workload(some)["break_even_rate"] == found["break_even_rate"]


def test_unified_policies_with_smaller_steps_are_rivals_too() -> None:
    rows = points(
        chunked=[(4, 100, 1.0), (8, 500, 0.8)],
        prefill_first=[(4, 120, 1.0), (8, 450, 0.7)],
        semi_pd_dynamic=[(4, 125, 1.0), (8, 300, 0.8)],
        semi_pd_dynamic_shortest=[(4, 100, 1.0), (8, 150, 0.85)],
    )
    found = serving_summary.summarise_workload(rows)
    assert found["mean_e2e_speedup_max"] == pytest.approx(450 / 300)
    assert found["goodput_vs_best_unified"] == found["goodput_vs_chunked"] == 1.0
    rows += points(
        chunked_1024=[(4, 100, 1.0), (8, 400, 0.9)],
        chunked_512_shortest=[(8, 240, 0.95)],
    )
    found = serving_summary.summarise_workload(rows)
    assert found["mean_e2e_speedup_max"] == pytest.approx(400 / 300)
    assert found["goodput_vs_chunked"] == 1.0
    # It bears 8/s at least, we 6.
    assert found["goodput_vs_best_unified"] == pytest.approx(6 / 8)
    assert found["relations"]["goodput_vs_best_unified"] == "<="
    twin = found["shortest"]
    assert twin["mean_e2e_speedup_max"] == pytest.approx(240 / 150)
    assert "goodput_vs_best_unified" not in twin["against_twins"]
    ours = 4 + 4 * 0.1 / 0.15
    assert twin["goodput_vs_best_unified"] == pytest.approx(ours / 8)


def test_names_say_what_is_measured() -> None:
    parts = serving_impls.parts
    assert parts("chunked") == ("chunked", None, False)
    assert parts("chunked_512_shortest") == ("chunked", 512, True)
    assert parts("auto_mean_1024") == ("auto_mean", 1024, False)
    assert parts("semi_pd_100_100_shortest") == ("semi_pd_100_100", None, True)
    for impl in serving_impls.ENGINES:
        plain, tokens, shortest = parts(impl)
        again = f"{plain}_{tokens}" if tokens else plain
        assert again + serving_impls.SHORTEST * shortest == impl
        assert plain in serving_impls.ENGINES


def test_shares_that_divide_the_gpu_are_compared_each_by_itself() -> None:
    rows = points(
        chunked=[(4, 100, 0.95), (8, 500, 0.8)],
        prefill_first=[(4, 120, 0.95), (8, 450, 0.5)],
        semi_pd_100_100=[(4, 120, 0.95), (8, 450, 0.85)],
        semi_pd_100_100_shortest=[(4, 120, 0.95), (8, 450, 0.85)],
        semi_pd_dynamic=[(4, 125, 0.95), (8, 300, 0.9)],
    )
    assert "fixed" not in serving_summary.summarise_workload(rows)
    rows += points(semi_pd_90_10_shortest=[(4, 200, 1.0), (8, 600, 0.91)])
    found = serving_summary.summarise_workload(rows)["fixed"]
    assert list(found) == ["semi_pd_90_10_shortest"]
    (one,) = found.values()
    assert one["mean_e2e_speedup_max"] == pytest.approx(450 / 600)
    assert one["goodput_vs_chunked"] == pytest.approx(8 / (4 + 4 * 0.05 / 0.15))
    assert one["goodput_dynamic_vs_100_100"] == pytest.approx(8 / 6)
    assert one["relations"]["goodput_vs_chunked"] == ">="


def test_the_controller_without_an_slo_is_compared_as_auto_too() -> None:
    rows = points(
        chunked=[(4, 100, 1.0), (8, 500, 0.8)],
        prefill_first=[(4, 120, 1.0), (8, 450, 0.5)],
        chunked_shortest=[(4, 90, 1.0), (8, 400, 0.85)],
        semi_pd_dynamic=[(4, 125, 1.0), (8, 300, 0.9)],
    )
    assert "auto_mean" not in serving_summary.summarise_workload(rows)
    rows += points(auto_mean=[(4, 100, 1.0), (8, 250, 0.8)])
    found = serving_summary.summarise_workload(rows)
    assert found["auto_mean"]["mean_e2e_speedup_max"] == pytest.approx(450 / 250)
    assert found["auto_mean"]["goodput_vs_chunked"] == pytest.approx(1.0)
    assert "shortest" not in found
    rows += points(auto_mean_shortest=[(4, 90, 1.0), (8, 200, 0.95)])
    again = serving_summary.summarise_workload(rows)
    assert again["auto_mean"] == found["auto_mean"]
    twin = again["shortest"]["auto_mean"]
    assert twin["auto_vs_better_min"] is None
    assert "no controller" in twin["null_because"]["auto_vs_better_min"]
    assert twin["mean_e2e_speedup_max"] == pytest.approx(400 / 200)
    assert (twin["goodput_vs_chunked"], twin["relations"]["goodput_vs_chunked"]) == (
        pytest.approx(8 / 6),
        ">=",
    )


def test_auto_is_compared_in_its_own_order_and_aim() -> None:
    rows = points(
        chunked=[(4, 100, 1.0), (8, 500, 0.8)],
        prefill_first=[(4, 120, 1.0), (8, 450, 0.5)],
        chunked_shortest=[(4, 90, 1.0), (8, 400, 0.85)],
        semi_pd_dynamic_shortest=[(4, 125, 1.0), (8, 150, 0.9)],
        auto_shortest=[(4, 100, 1.0), (8, 160, 0.9)],
        auto_mean_shortest=[(4, 90, 1.0), (8, 200, 0.9)],
    )
    found = serving_summary.summarise_workload(rows)
    assert found["auto_vs_better_min"] is None
    twins = found["shortest"]
    assert twins["auto_vs_better_min"] == pytest.approx(90 / 100)
    assert twins["auto_mean"]["auto_vs_better_min"] == pytest.approx(150 / 200)
    rows += points(semi_pd_mean_shortest=[(8, 100, 0.1)])
    twins = serving_summary.summarise_workload(rows)["shortest"]
    assert twins["auto_vs_better_min"] == pytest.approx(90 / 100)
    assert twins["auto_mean"]["auto_vs_better_min"] == pytest.approx(100 / 200)


def test_auto_with_smaller_steps_has_a_part_of_its_own() -> None:
    rows = points(
        chunked=[(4, 100, 1.0), (8, 500, 0.8)],
        prefill_first=[(4, 120, 1.0), (8, 450, 0.5)],
        chunked_1024_shortest=[(4, 90, 1.0), (8, 240, 0.85)],
        semi_pd_dynamic_shortest=[(4, 125, 1.0), (8, 150, 0.9)],
        semi_pd_mean_shortest=[(8, 100, 0.5)],
        auto_1024=[(4, 125, 1.0), (8, 300, 0.9)],
        auto_1024_shortest=[(4, 100, 1.0), (8, 160, 0.9)],
        auto_mean_512_shortest=[(4, 90, 1.0), (8, 200, 0.9)],
    )
    found = serving_summary.summarise_workload(rows)
    assert found["auto_1024"]["mean_e2e_speedup_max"] == pytest.approx(450 / 300)
    assert "no controller" in found["auto_1024"]["null_because"]["auto_vs_better_min"]
    assert "auto_mean" not in found
    assert found["auto_vs_better_min"] is None
    twins = found["shortest"]
    assert {key for key in twins if key.startswith("auto")} == {
        "auto_vs_better_min",
        "auto_1024",
        "auto_mean_512",
    }
    assert twins["auto_1024"]["mean_e2e_speedup_max"] == pytest.approx(240 / 160)
    assert twins["auto_1024"]["goodput_vs_best_unified"] == pytest.approx(8 / (4 + 4 * 0.1 / 0.15))
    # At 4/s the best of them is a smaller step's.
    assert twins["auto_1024"]["auto_vs_better_min"] == pytest.approx(90 / 100)
    assert twins["auto_mean_512"]["auto_vs_better_min"] == pytest.approx(100 / 200)


@pytest.mark.parametrize("impl", ["auto", "auto_1024", "auto_mean", "auto_mean_512"])
def test_one_twin_is_enough(impl: str) -> None:
    rows = points(chunked=[(4, 100, 1.0)], prefill_first=[(4, 120, 1.0)])
    rows.append(point(f"{impl}_shortest", 4, 50, 1.0))
    twins = serving_summary.summarise_workload(rows)["shortest"]
    if impl != "auto":
        assert twins[impl]["mean_e2e_speedup_max"] == 2.0


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(9, "="), (8, ">=")], (9, ">=")),  # that may be above 9
        ([(8, ">="), (8, "=")], (8, ">=")),
        ([(8, "="), (8, "<")], (8, "=")),
        ([(8, "<"), (9, "<")], (9, "<")),
        ([(8, ">="), (9, "<")], (8, ">=")),
        ([(8, "="), (9, "<")], (8, ">=")),  # that may be between them
    ],
)
def test_the_highest_goodput(found: list[tuple[float, str]], best: tuple[float, str]) -> None:
    goodputs = [Goodput(*values) for values in found]
    assert serving_summary.most(goodputs) == serving_summary.most(goodputs[::-1]) == best


def test_auto_is_judged_by_controllers_of_its_own_aim_where_those_served() -> None:
    same = [(4, 100, 1.0), (8, 300, 0.8)]
    rows = points(
        chunked=same,
        prefill_first=same,
        semi_pd_dynamic=[(8, 200, 0.9)],
        semi_pd_mean=[(8, 150, 0.5)],
        auto=[(4, 200, 1.0), (8, 250, 0.9)],
        auto_mean=[(4, 200, 1.0), (8, 160, 0.9)],
    )
    found = serving_summary.summarise_workload(rows)
    # Nothing is said of 4/s, where neither controller served.
    assert found["auto_vs_better_min"] == pytest.approx(200 / 250)
    assert found["auto_mean"]["auto_vs_better_min"] == pytest.approx(150 / 160)


def test_what_was_not_measured_is_null_and_says_why() -> None:
    rows = points(chunked=[(4, 100, 1.0)], semi_pd_dynamic=[(4, 90, 1.0)])
    found = serving_summary.summarise_workload(rows)
    keys = [
        "mean_e2e_speedup_max",
        "mean_e2e_speedup_at_80pct_load",
        "break_even_rate",
        "break_even_ratio",
        "auto_vs_better_min",
        "goodput_vs_prefill_first",
        "goodput_vs_chunked",
        "goodput_dynamic_vs_100_100",
        "goodput_vs_disaggregated_per_gpu",
    ]
    assert all(found[key] is None and found["null_because"][key] for key in keys)
    assert found["null_because"]["goodput_vs_prefill_first"] == "prefill_first not measured"
    assert "same side" in found["null_because"]["goodput_vs_chunked"]
    json.dumps(found, allow_nan=False)


def test_load_of_80_percent_is_not_guessed() -> None:
    same = [(2, 100, 1.0), (7, 200, 1.0)]
    rows = points(chunked=same, prefill_first=same, semi_pd_dynamic=same)
    found = serving_summary.summarise_workload(rows)
    assert found["mean_e2e_speedup_max"] == 1.0
    assert found["mean_e2e_speedup_at_80pct_load"] is None
    assert "0.20 to 0.70" in found["null_because"]["mean_e2e_speedup_at_80pct_load"]


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    rows = [point("chunked", 4, 90, 1.0), point("chunked", 4, 110, 0.8, seed=1)]
    found = serving_summary.curve([*rows, point("chunked", 2, 50, 1.0)])
    assert found.rates == [2, 4]
    assert found.e2e_ms == [50, 100]
    assert found.attained["tight"] == [1.0, pytest.approx(0.9)]
    assert found.spread == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("ours", "theirs", "relation"),
    [
        ("=", "=", "="),
        (">=", "=", ">="),
        ("=", "<", ">="),
        (">=", "<", ">="),
        ("=", ">=", "<="),
        ("<", "=", "<="),
        ("<", ">=", "<="),
        (">=", ">=", None),
        ("<", "<", None),
    ],
)
def test_ratio_of_goodputs_that_are_bounds(ours: str, theirs: str, relation: str | None) -> None:
    found = serving_summary.divide(Goodput(6.0, ours), Goodput(4.0, theirs))
    assert found == (None if relation is None else (1.5, relation))


def test_break_even() -> None:
    assert serving_summary.break_even([1, 2], [1.1, 1.2]) == (None, "<")
    assert serving_summary.break_even([1, 2], [1.1, 0.9]) == (2, ">=")
    # Noise at a low rate does not count: from there on it must stay better.
    assert serving_summary.break_even([1, 2, 3, 4], [0.9, 1.1, 0.5, 1.5]) == (3.5, "=")


def break_even_of(**of: list[tuple[float, float, float]]) -> dict[str, Any]:
    """The summary where chunked is the better unified policy, with (rate, E2E, n / w)."""
    rows = [
        point(impl, rate, e2e, 1.0) | ({"saved_per_waiting": ratio} if ratio else {})
        for impl, found in of.items()
        for rate, e2e, ratio in found
    ]
    rows += [row | {"impl": "prefill_first", "mean_e2el_ms": 9e9} for row in rows]
    return serving_summary.summarise_workload(rows)


def test_break_even_ratio_and_what_auto_makes_of_it() -> None:
    chunked = [(1, 100, 0.5), (2, 110, 2.0), (4, 200, 8.0)]
    dynamic = [(1, 110, 0), (2, 121, 0), (4, 160, 0)]
    found = break_even_of(
        chunked=chunked, semi_pd_dynamic=dynamic, auto=[(1, 100, 0), (2, 110, 0), (4, 165, 0)]
    )
    # Speed-ups 1 / 1.1 at 2/s and 1.25 at 4/s.
    part = (1 - 1 / 1.1) / (1.25 - 1 / 1.1)
    assert found["break_even_rate"] == pytest.approx(2 + 2 * part)
    assert found["break_even_ratio"] == pytest.approx(2 + 6 * part)
    assert found["relations"]["break_even_rate"] == "="
    assert found["auto_vs_better_min"] == pytest.approx(160 / 165)
    below = break_even_of(chunked=chunked[:2], semi_pd_dynamic=dynamic[:2])
    assert (below["break_even_rate"], below["break_even_ratio"]) == (2, 2.0)
    assert below["relations"]["break_even_rate"] == ">="
    assert below["auto_vs_better_min"] is None
    above = break_even_of(chunked=chunked[2:], semi_pd_dynamic=dynamic[2:])
    assert above["break_even_rate"] is None
    assert "from 4 on" in above["null_because"]["break_even_ratio"]
    uncounted = break_even_of(chunked=[(1, 100, 0)], semi_pd_dynamic=[(1, 110, 0)])
    assert "not counted" in uncounted["null_because"]["break_even_ratio"]


def test_capacity_is_of_the_second_half_of_those_that_ended() -> None:
    assert semi_pd_serving.second_half_per_s([11.0, 10.5, 10.0, 9.0]) == 2.0
    with pytest.raises(ValueError, match=r"1 requests .* at least 2"):
        semi_pd_serving.second_half_per_s([1.0])
    with pytest.raises(ValueError, match=r"both at 1\.5 s"):
        semi_pd_serving.second_half_per_s([1.5] * 8)


def test_fields_of_a_point() -> None:
    times = {"due_s": 0.0, "sent_s": 0.0, "prompt_tokens": 9, "wanted_tokens": 5}
    records = [
        RequestRecord(first_token_s=0.1, finished_s=0.5, output_tokens=5, **times),
        RequestRecord(first_token_s=0.3, finished_s=0.7, output_tokens=5, **times),
        RequestRecord(first_token_s=0.1, finished_s=1.3, output_tokens=5, **times),
    ]
    slos = {"tight": Slo(0.2, 0.1), "loose": Slo(0.3, 0.2)}
    fields = semi_pd_serving.point_fields(records, slos)
    assert fields["mean_e2el_ms"] == pytest.approx(2500 / 3)
    assert [fields[k] for k in ("tight", "tight_ttft", "tight_tpot")] == pytest.approx(
        [1 / 3, 2 / 3, 2 / 3]
    )
    assert fields["loose"] == pytest.approx(2 / 3)


# --- switches and hand-overs -----------------------------------------------------------------


def logged(begun_s: float, ended_s: float, *, launched_s: float = 0.0, **plan: Any) -> LoggedStep:
    plan = {"sequences": [], "chunks": [], "rows": np.zeros(0, np.int32)} | plan
    step = LoggedStep(SimpleNamespace(**plan), 1, launched_s)
    step.begun_s, step.ended_s = begun_s, ended_s
    return step


def test_hand_overs_count_from_the_last_chunk_to_the_first_decode_step() -> None:
    a, b = object(), object()
    first = SimpleNamespace(sequence=a, last=False, end=8)
    last = SimpleNamespace(sequence=a, last=True, end=12)
    alone = SimpleNamespace(sequence=b, last=True, end=5)
    steps = [
        logged(0.0, 1.0, chunks=[first]),
        logged(1.0, 2.0, chunks=[last, alone]),
        logged(2.5, 3.5, launched_s=2.25, sequences=[a]),
        logged(3.5, 4.0, launched_s=2.5, sequences=[a, b]),
    ]
    found = semi_pd_switch.hand_overs(steps)
    assert [(h.launch_s, h.start_s, h.context_tokens) for h in found] == [
        (0.25, 0.5, 12),
        (0.5, 1.5, 5),
    ]
    steps[1].begun_s = None  # it never ran
    assert semi_pd_switch.hand_overs(steps) == []


def test_a_pause_is_the_largest_gap_around_a_switch() -> None:
    # Tokens every 10 ms, but for one gap of 50 ms while the executors change and 60 ms before.
    times = np.cumsum([0.0, *[0.01] * 20, 0.06, *[0.01] * 5, 0.05, *[0.01] * 20])
    gaps = times[:-1], times[1:]
    held_s = float(times[26]) + 0.02

    def of(phase: str, asked_s: float) -> Switch:
        return Switch(phase, 100, 50, asked_s, held_s, held_s + 0.01)

    def fields_of(*switches: semi_pd_switch.Switched) -> dict[str, Any]:
        return semi_pd_switch.window_fields([s.window for s in switches], gaps, [])

    settled_s = held_s + 0.01
    early = semi_pd_switch.Switched(of("prefill", times[15]), of("decode", times[15]), settled_s)
    fields = fields_of(early)
    assert fields["p99_ms"] == pytest.approx(50)
    assert fields["at_switch_p50_ms"] == pytest.approx(40)
    assert fields["median_gap_ms"] == pytest.approx(10)
    assert early.window.shares == Shares(50, 50)
    assert early.done_s - early.asked_s == pytest.approx(held_s + 0.01 - times[15])
    shares = dataclasses.replace(early.decode, held_s=times[5] + 0.001, done_s=times[5] + 0.002)
    quick = semi_pd_switch.Switched(early.prefill, shares, settled_s)
    assert fields_of(quick)["at_switch_p99_ms"] == pytest.approx(0, abs=1e-6)
    # What comes right after it counts too: the gap of 60 ms.
    begun = semi_pd_switch.Switched(of("prefill", times[5]), shares, float(times[22]))
    assert fields_of(begun)["p99_ms"] == pytest.approx(50)
    # Nobody was decoded at the hand-over, or at all.
    late = dataclasses.replace(early.decode, held_s=100.0, done_s=101.0)
    fields = fields_of(early, early._replace(decode=late))
    assert fields["at_switch_n"] == 1
    assert fields["at_switch_p99_ms"] == pytest.approx(40)
    never = semi_pd_switch.Switched(of("prefill", 100.0), of("decode", 100.0), 101.0)
    with pytest.raises(ValueError, match="in 1 windows"):
        fields_of(early, never)


def test_gaps_beside_prefill_are_told_from_others() -> None:
    # Tokens every 10 ms; of two requests, and one gap of 40 ms from 0.1 on, in each.
    one = np.cumsum([0.0, *[0.01] * 10, 0.04, *[0.01] * 10])
    two = one + 0.005
    gaps = np.concatenate([one[:-1], two[:-1]]), np.concatenate([one[1:], two[1:]])
    span = semi_pd_switch.Span
    # One ends in the large gaps and touches a small one, the other lies within two small ones.
    prefills = [span(0.102, 0.12), span(0.178, 0.179)]
    window = semi_pd_switch.Window(Shares(50, 50), span(0.051, 0.239), span(0.051, 0.052))
    fields = semi_pd_switch.window_fields([window], gaps, prefills)
    # One: the gaps from 0.05 to 0.24. Two: those from 0.045 to 0.245.
    assert fields["beside_prefill_part"] == pytest.approx(5 / (16 + 17))
    assert fields["gap_beside_prefill_p50_ms"] == pytest.approx(10)
    assert fields["gap_beside_prefill_p99_ms"] == pytest.approx(40)
    assert fields["gap_alone_p99_ms"] == pytest.approx(10)
    fields = semi_pd_switch.window_fields([window], gaps, [])
    assert (fields["beside_prefill_part"], fields["gap_beside_prefill_p99_ms"]) == (0, None)
    assert fields["gap_alone_p99_ms"] == pytest.approx(40)


def test_a_switch_adds_what_a_control_has_not(tmp_path) -> None:
    report = Report("semi_pd_switch", "?", out=tmp_path)
    semi_pd_switch.summarise(report, "c")
    assert report.summary == {}
    common = {"gap_alone_p50_ms": 5.0, "gap_alone_p99_ms": 6.0}
    common |= {"gap_beside_prefill_p50_ms": 20.0, "gap_beside_prefill_p99_ms": 50.0}
    of_switch = {"p99_ms": 40.0, "at_switch_p50_ms": 9.0, "at_switch_p99_ms": 30.0}
    report.add("c", "pool", [10.0, 30.0, 20.0], serve_p99_ms=80.0, **of_switch, **common)
    of_control = {"p99_ms": 42.0, "at_switch_p50_ms": 4.0, "at_switch_p99_ms": None}
    report.add("c", "pool control", [9.0, 8.0, 7.0], **of_control, **common)
    semi_pd_switch.summarise(report, "c")
    assert report.summary == {
        "pool_pause_p50_ms": 20.0,
        "pool_pause_p99_ms": 40.0,
        "pool_control_pause_p50_ms": 8.0,
        "pool_control_pause_p99_ms": 42.0,
        "pool_added_p50_ms": 12.0,
        "pool_added_p99_ms": -2.0,
        "pool_at_switch_p99_ms": 30.0,
        "pool_added_at_switch_p50_ms": 5.0,
        "pool_serve_p99_ms": 80.0,
        "pool_switches": 3,
        "pool_control_gap_alone_p50_ms": 5.0,
        "pool_control_gap_alone_p99_ms": 6.0,
        "pool_control_gap_beside_prefill_p50_ms": 20.0,
        "pool_control_gap_beside_prefill_p99_ms": 50.0,
    }


# --- memory ----------------------------------------------------------------------------------


def test_memory_of_a_process() -> None:
    rollup = "5581-7ffd ---p 0 00:00 0 [rollup]\nRss:  400 kB\nPss:  123 kB\nPss_Dirty: 9 kB\n"
    assert semi_pd_memory.parse_pss(rollup) == 123 * 1024
    smaps = (
        "7f00-7f10 rw-s 00000000 00:01 12    /memfd:jpd (deleted)\nSize: 64 kB\nPss:  32 kB\n"
        "Pss_Dirty: 1 kB\n"
        "7f10-7f20 r-xp 00000000 00:01 13    /usr/lib/libc.so\nPss:  900 kB\n"
        "7f20-7f30 rw-s 00000000 00:01 14    /memfd:jpd (deleted)\nPss:  8 kB\n"
    )
    assert semi_pd_memory.parse_mapped(smaps) == 40 * 1024


def test_memory_summary() -> None:
    unified = {"processes": [{"name": "executor", "gb": 30.0}], "shared": {}}
    semi_pd = {
        "processes": [
            {"name": "prefill executor", "gb": 1.0},
            {"name": "decode executor", "gb": 1.2},
            {"name": "storage owner and MPS", "gb": 29.5},
        ],
        "shared": {"weights": 16e9, "pages": 13e9},
    }
    found = semi_pd_memory.summarise(unified, semi_pd)
    assert found["extra_gb"] == pytest.approx(1.7)
    assert found["weights_counted"] == 1
    semi_pd["processes"][1]["gb"] = 17.0
    assert semi_pd_memory.summarise(unified, semi_pd)["weights_counted"] == 2
    for row, mapped in zip(semi_pd["processes"], (14.5, 14.5, 0.0), strict=True):
        row["mapped_gb"] = mapped
    assert semi_pd_memory.summarise(unified, semi_pd)["weights_counted"] == pytest.approx(1.0)


# --- SM shares -------------------------------------------------------------------------------


def measured(seconds: float, **changes: Any) -> MeasuredStep:
    work = {"rows": 0, "context_tokens": 0, "prompt_tokens": 0, "pairs": 0}
    padded = {"padded_rows": 0, "padded_tokens": 0, "padded_context": 0}
    return MeasuredStep(**(work | padded | changes), seconds=seconds)


def test_models_that_made_the_times_have_no_error() -> None:
    decode, prefill = share_fits.Size(32, 1024, 1024), share_fits.Size(0, 2048, 2048)
    steps = {}
    for x, y in ((30, 70), (50, 50), (80, 20), (100, 100)):
        shares = Shares(x, y)
        alone = (1 + 32 / 128) * decode_curve(y, 45.0)
        beside = H200.decode_slowdown * alone + overlap_wait(shares, H200)
        key = share_fits.Key(decode, shares, None)
        steps[key] = measured(0.01 * alone, rows=32)
        steps[key._replace(beside="2048")] = measured(0.01 * beside, rows=32, other_busy=1.0)
        key = share_fits.Key(prefill, shares, None)
        alone = 0.1 * prefill_curve(x, 0.55)
        beside = prefill_beside(shares, H200) * alone
        steps[key] = measured(alone, prompt_tokens=2048)
        steps[key._replace(beside="32 x 1024")] = measured(
            beside, prompt_tokens=2048, other_busy=1.0
        )
    found = share_fits.summarise(steps)
    assert found["decode_model_max_error"] < 1e-9
    assert found["prefill_model_max_error"] < 1e-9
    assert found["prefill_max_slowdown_beside"] == pytest.approx(1 + 0.7 * H200.prefill_pull)
    # The paper's decode is proportional to 1/y plus a constant: it has no knee.
    assert found["paper_decode_max_error"] > 0.01
    assert len(share_fits.panels(steps)) == 2


def test_rows_of_the_surface_say_all_that_is_fitted(tmp_path, monkeypatch, capsys) -> None:
    report = Report("sm_share_surface", SURFACE, out=tmp_path)
    kinds = [
        share_fits.Key(share_fits.Size(4, 64, 64), Shares(50, 30), None),
        share_fits.Key(share_fits.Size(4, 64, 64), Shares(50, 30), "128"),
        share_fits.Key(share_fits.Size(0, 128, 192), Shares(50, 30), "4 x 64"),
    ]
    steps = {}
    for i, key in enumerate(kinds):
        work = {"rows": key.size.rows} if key.size.rows else {"prompt_tokens": key.size.tokens}
        work |= {"prefill_share": 50, "decode_share": 30, "other_busy": 0.25 * i}
        of = [measured(seconds, **work) for seconds in (0.03, 0.01, 0.02)]
        steps[key] = share_fits.typical(of)
        report.add(key.case, "jpd", configuration=str(i), **share_fits.fields_of(key, of))
    report.summary["model"] = "tiny"
    report.save()
    assert share_fits.steps_of(report.all_rows()) == steps
    assert [step.seconds for step in steps.values()] == [0.02] * 3
    # Files can be written again where there is no GPU, and nothing is measured for them.
    argv = ["surface", "--seconds", "0", "--merge", str(report.path), "--out", str(tmp_path / "b")]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sm_share_surface, "measure", None)
    with pytest.raises(SystemExit) as end:
        sm_share_surface.main()
    assert end.value.code == 0
    document = load_document(tmp_path / "b" / "sm_share_surface.json")
    assert document["rows"] == report.rows
    assert document["summary"] == {"model": "tiny"} | share_fits.summarise(steps)
    assert document["summary"]["decode_max_slowdown_beside"] == 1.0
    times = StepTimes.read(tmp_path / "b" / "sm_share_surface_steps.json")
    assert times.steps == list(steps.values())
    assert times.source.startswith(f"tiny on {report.env['gpu'] or report.env['cpu']}, ")


def test_the_clock_where_prefill_is_slowed_down_most() -> None:
    alone = share_fits.Key(share_fits.Size(0, 2048, 2048), Shares(70, 30), None)
    rows = []
    for beside, seconds, mhz in ((None, 0.05, 1850.0), ("a", 0.06, 1700.0), ("b", 0.065, 1480.0)):
        work = {"prompt_tokens": 2048, "prefill_share": 70, "decode_share": 30}
        fields = share_fits.fields_of(alone._replace(beside=beside), [measured(seconds, **work)])
        rows.append({"status": "ok", "sm_mhz": mhz} | fields)
    assert share_fits.clock_ratio(rows) == {"prefill_max_slowdown_clock_ratio": 1.25}
    rows[2]["sm_mhz"] = None
    assert share_fits.clock_ratio(rows) == {}
    assert share_fits.clock_ratio(rows[:1]) == share_fits.clock_ratio([]) == {}


def test_the_part_of_a_step_beside_others() -> None:
    step, busy_part = logged(1.0, 3.0), sm_share_surface.busy_part
    assert busy_part(step, [logged(0.0, 1.5), logged(2.5, 2.75), logged(5.0, 6.0)]) == (
        pytest.approx(0.375)
    )
    assert busy_part(step, []) == 0


def test_configurations_measure_each_share_alone_once() -> None:
    pairs = [Shares(50, 50), Shares(50, 100), Shares(100, 100)]
    found = sm_share_surface.configurations(pairs, [(2, 64)], [32])
    alone = [c for c in found if None in c]
    assert [(c[0].decode if c[1] else c[0].prefill) for c in alone] == [50, 50, 100, 100]
    assert len(found) == 4 + 3


def test_curves_need_no_matplotlib(tmp_path, capsys) -> None:
    panel = curves.Panel("t", "x", "y", {"a": ([1, 2], [3, 4])})
    drawn = curves.write_svg(tmp_path / "a.svg", "?", [[panel, panel], [panel]])
    assert drawn == (tmp_path / "a.svg").exists()
    assert drawn or "matplotlib is not installed" in capsys.readouterr().out
    assert not curves.write_svg(tmp_path / "b.svg", "?", [[], []])
    assert "nothing was measured" in capsys.readouterr().out


def test_a_variant_is_dashed_in_the_colour_of_its_curve(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    lines = {name: ([1, 2], [3, 4]) for name in ("a", "b")}
    panel = curves.Panel("t", "x", "y", lines, variants={"b": "a"})
    assert curves.write_svg(tmp_path / "a.svg", "?", [[panel, panel], [panel]])
    text = (tmp_path / "a.svg").read_text()
    assert text.count("stroke-dasharray: 5") == 4  # in three panels and the legend
    assert set(re.findall("#[0-9a-f]{6}", text)) == {"#000000", "#ffffff", "#1f77b4"}


# --- simulator -------------------------------------------------------------------------------


def test_errors_of_the_simulator_are_of_means(tmp_path) -> None:
    report = Report("simulator_fidelity", "?", out=tmp_path)
    error = SimpleNamespace(mean=0.02, p95=0.05)
    fitted = SimpleNamespace(decode=error, prompt=error)

    def records(first_s: float, last_s: float, tokens: int = 5) -> list[RequestRecord]:
        times = {"due_s": 0.0, "sent_s": 0.0, "prompt_tokens": 9, "wanted_tokens": 5}
        return [
            RequestRecord(first_token_s=first_s, finished_s=last_s, output_tokens=tokens, **times)
        ]

    def add(topology: str, real: Any, simulated: Any) -> None:
        simulator_fidelity.add_case(report, topology, topology, real, simulated, fitted)

    add("chunked", records(0.1, 0.5), records(0.11, 0.5))
    add("semi_pd", records(0.1, 0.5), records(0.1, 0.3))
    found = simulator_fidelity.summarise(report.rows)
    assert found["ttft_error_pct_max"] == pytest.approx(10)
    assert found["tpot_error_pct_max"] == pytest.approx(50)
    assert found["e2el_error_pct_max"] == pytest.approx(40)
    assert found["chunked_decode_fit_error_pct"] == found["semi_pd_prompt_fit_error_pct"] == 2
    assert found["semi_pd_decode_fit_error_p95_pct"] == 5
    add("auto", records(0.1, 0.5) + records(0.1, 0.5, tokens=4), records(0.1, 0.5))
    assert [row["status"] for row in report.rows[4:]] == ["failed: 0 failed, 1 truncated", "ok"]


# --- crashes ---------------------------------------------------------------------------------


def test_a_crash_that_loses_something_is_a_failed_row(tmp_path) -> None:
    report = Report("semi_pd_crash", "?", out=tmp_path)
    done = semi_pd_crash.CrashRun(
        kills=[semi_pd_crash.Kill("decode", 7, 1.0, 1.5)],
        requests=[LoadRequest([1], 2), LoadRequest([1], 3)],
        tokens=[[5, 6], [5, 6]],
        leaked_pages=4,
    )
    semi_pd_crash.add_rows(report, "c", "cold", done, Parity())
    assert report.find("c decode", "cold")["ms"] == pytest.approx(500)
    assert report.rows[-1]["status"] == "failed: 1 lost, 4 leaked_pages"
    summary = semi_pd_crash.summarise(report.rows, {"cold": [500.0]})
    assert (summary["requests_lost"], summary["pages_leaked"], summary["kills"]) == (1, 4, 1)
    times = [summary[f"cold_{of}_ms"] for of in ("recovery_p50", "decode_recovery_p50")]
    assert [*times, summary["cold_decode_recovery_max_ms"]] == pytest.approx([500] * 3)
    faults = [f"token {n}" for n in range(12)]
    semi_pd_crash.add_rows(report, "d", "cold", done, Parity(faults=faults))
    named = "; ".join(faults[:10])
    assert report.rows[-1]["status"] == f"failed: 1 lost, 4 leaked_pages, 12 wrong; {named}"
