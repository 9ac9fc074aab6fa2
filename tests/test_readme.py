"""The README's example runs, and its numbers are those of the stored results."""

import json
import re

from benchmarks import readme

README = (readme.ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "My dear Elizabeth, " in out
    assert len(out) > 300


def test_the_results_are_those_of_the_files():
    assert readme.rewritten(README) == README, "run python -m benchmarks.readme"


def test_a_number_that_no_file_has_is_noticed():
    number = re.search(r"\d\.\d\d× cuBLAS", README).group()
    assert readme.rewritten(README.replace(number, "9.99× cuBLAS")) == README


def test_every_served_workload_has_a_row():
    file = "h200/semi_pd_serving.json"
    summary = json.loads((readme.RESULTS / file).read_text())["summary"]
    served = [name for name, found in summary.items() if isinstance(found, dict)]
    rows = [line.what for line in readme.LINES if line.file == file]
    assert len(served) == len(rows) == 4
    assert all(any(name in row for row in rows) for name in served)


def test_what_was_measured_of_a_workload_is_said_and_no_more():
    nothing = {"mean_e2e_speedup_max": None, "mean_e2e_speedup_at_80pct_load": None}
    found = nothing | {"without_slo": nothing, "auto_vs_better_min": None, "relations": {}}
    assert readme._served_one(found) == ""
    auto = nothing | {"goodput_vs_chunked": 1.497, "relations": {"goodput_vs_chunked": ">="}}
    mean = {"mean_e2e_speedup_max": 1.5, "mean_e2e_speedup_at_80pct_load": None}
    shortest = found | {"without_slo": mean, "auto_1024": auto, "goodput_vs_best_unified": 0.6611}
    shortest["relations"] = {"goodput_vs_best_unified": "<="}
    said = readme._served_one(found | {"shortest": shortest})
    assert said == (
        "with short prompts first, those policies in either order, (aimed at no SLO 1.50× at "
        "best), goodput at most 0.67× of the best unified policy; `auto` with the tight SLO and "
        "mixed steps of 1024 tokens with short prompts first: goodput at least 1.49× chunked"
    )
