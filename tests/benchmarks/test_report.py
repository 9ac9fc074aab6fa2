"""Result rows, files and their renderings."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report as report_module
from benchmarks.environment import capture_env, git_commit, gpu_slug
from benchmarks.models import MODELS, decode_cost
from benchmarks.render import to_markdown
from benchmarks.report import Report
from benchmarks.rows import ROW_KEYS, bound_ms, failed_row, load, make_row, stats, validate

ROOT = Path(report_module.__file__).parents[1]


@pytest.fixture
def filled(tmp_path):
    report = Report("question", "How long is a step?", out=tmp_path / "cpu")
    report.add(
        "B=1", "ours", [3.0, 1.0, 2.0], "ms", nbytes=8, flops=4, bound=1.5, rel_err=1e-3, steps=7
    )
    report.fail("B=1", "theirs", MemoryError("no\nroom | left"))
    report.summary["speedup"] = 1.25
    return report


def test_file_holds_the_schema_and_every_row(filled):
    path = filled.finish()
    doc = json.loads(path.read_text())
    assert path.name == "question.json"
    assert list(doc) == [
        "schema",
        "question",
        "command",
        "git",
        "date",
        "env",
        "rows",
        "summary",
    ]
    assert doc["schema"] == 1
    assert doc["summary"] == {"speedup": 1.25}
    measured, failed = doc["rows"]
    assert measured == {
        "case": "B=1",
        "impl": "ours",
        "ms": 2.0,
        "p10": pytest.approx(1.2),
        "p90": pytest.approx(2.8),
        "n": 3,
        "bytes": 8,
        "flops": 4,
        "pct_of_bound": 75.0,
        "rel_err": 1e-3,
        "steps": 7,
        "status": "ok",
    }
    assert failed["status"] == "failed: MemoryError: no room | left"
    assert set(ROW_KEYS) <= set(failed)
    assert "ms" not in failed
    assert load(path) == doc


def test_failed_rows_are_counted_shown_and_never_found(filled, capsys):
    assert filled.failures == 1
    assert filled.find("B=1", "ours")["ms"] == 2.0
    assert filled.find("B=1", "theirs") is None
    filled.show()
    shown = capsys.readouterr().out
    assert "How long is a step?" in shown
    assert "failed: MemoryError" in shown
    assert "speedup = 1.25" in shown


def test_markdown_has_one_line_a_row_and_escapes_pipes(filled):
    lines = to_markdown(filled.document()).splitlines()
    assert lines[0] == (
        "| case | impl | ms | p10 | p90 | n | bytes | flops | pct_of_bound | rel_err | steps "
        "| status |"
    )
    assert lines[1].startswith("|---|---|---:|")
    assert lines[2].startswith("| B=1 | ours | 2 | 1.2 | 2.8 | 3 | 8 | 4 | 75 | 0.001 | 7 | ok |")
    assert lines[3].endswith(r"| failed: MemoryError: no room \| left |")
    assert all(line.replace(r"\|", "").count("|") == 13 for line in lines[:4])
    assert "speedup = 1.25" in lines


def test_command_line_renders_stored_files(filled, capsys):
    path = filled.finish()
    capsys.readouterr()
    report_module.main([str(path), "--markdown"])
    assert capsys.readouterr().out.startswith("| case | impl |")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(ValueError, match=r"question\.json: schema 2 is not supported"):
        report_module.main([str(path)])


def test_rows_of_another_process_are_checked(filled):
    filled.extend([failed_row("B=2", "theirs", "gone")])
    assert filled.failures == 2
    with pytest.raises(ValueError, match="missing n"):
        filled.extend([{k: None for k in ROW_KEYS if k != "n"}])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"status": "fine"}, "status must be 'ok', 'failed: REASON' or 'not run: REASON'"),
        ({"status": "failed: x"}, "must not show a time"),
        ({"us": 1.0}, "one time unit"),
        ({"p90": None}, "needs p10, p90 and n"),
        ({"ms": math.nan}, "ms must be finite"),
        ({"case": ""}, "case must be a non-empty string"),
    ],
)
def test_a_wrong_row_is_refused(filled, change, complaint):
    doc = filled.document()
    validate(doc)
    with pytest.raises(ValueError, match=complaint):
        validate(doc | {"rows": [doc["rows"][0] | change]})


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_unusable_samples_are_refused(samples):
    with pytest.raises(ValueError, match="samples"):
        make_row("c", "i", samples)


def test_a_row_needs_a_result_and_a_known_unit():
    with pytest.raises(ValueError, match="no result"):
        make_row("c", "i")
    with pytest.raises(ValueError, match="must be finite, got nan"):
        make_row("c", "i", [1.0], rel_err=math.nan)
    with pytest.raises(ValueError, match="unit must be one of"):
        make_row("c", "i", [1.0], "s")
    assert make_row("c", "i", tokens_per_s=5.0)["tokens_per_s"] == 5.0


def test_an_empty_report_is_not_a_result(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        Report("empty", "?", out=tmp_path).finish()


def test_stats_are_linear_percentiles():
    assert stats(np.arange(11.0)) == (5.0, 1.0, 9.0, 11)


def test_bound_is_the_slower_of_memory_and_arithmetic():
    assert bound_ms(4e9, 1e12, bytes_per_s=4e12) == 1.0
    assert bound_ms(4e9, 4e12, bytes_per_s=4e12, flops_per_s=1e12) == 4e3


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        (None, "cpu"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_gpu_slug(name, slug):
    assert gpu_slug(name) == slug


def test_host_only_results_go_to_cpu():
    assert Report("h", "?", host_only=True).folder.name == "cpu"


def test_environment_names_versions_and_imports_no_framework():
    code = (
        "import sys; from benchmarks.report import Report; Report('n', '?')\n"
        "print(sorted({'jax', 'jaxlib', 'torch', 'transformers', 'cupy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    env = capture_env()
    assert {"gpu", "driver", "cuda", "jax", "jaxlib", "nccl", "torch", "xla_flags", "cpu"} <= set(
        env
    )
    assert env["jax"]


def test_git_commit_tells_dirty_from_clean_and_ignores_results(tmp_path):
    def git(*args):
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert git_commit(tmp_path) is None
    (tmp_path / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_commit(tmp_path)
    assert len(clean) == 40
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "x.json").write_text("{}")
    assert git_commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2\n")
    assert git_commit(tmp_path) == f"{clean}-dirty"


def test_chart_shows_every_case_and_marks_failures(filled, tmp_path):
    pytest.importorskip("matplotlib", reason="extra bench is not installed")
    svg = filled.finish().with_suffix(".svg")
    first = svg.read_bytes()
    assert b"<svg" in first
    filled.finish()
    assert svg.read_bytes() == first


def test_without_matplotlib_it_says_so(filled, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = filled.finish()
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not path.with_suffix(".svg").exists()


def test_decode_cost_of_llama2_7b_at_batch_1():
    # 6,738,415,616 parameters less the embedding table, of which one row is read, and 512 tokens
    # of KV (read 512, write 1: the new token's own is among the 512 read).
    parameters = 6_738_415_616 - 32000 * 4096 + 4096
    kv = 512 * 2 * 32 * 32 * 128
    assert decode_cost(MODELS["llama2-7b"], 1, 512).nbytes == 2 * (parameters + kv)
