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
