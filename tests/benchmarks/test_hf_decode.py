"""The Hugging Face baseline: its command line, its failures, and one live case with torch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.baselines import hf_decode
from benchmarks.rows import load

ROOT = Path(hf_decode.__file__).parents[2]


def test_without_torch_every_case_is_a_failed_row(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    out = tmp_path / "hf.json"
    cases = ["1:64:eager", "2:64:static_compile"]
    code = hf_decode.main(["--model", "tiny", "--case", *cases, "--json", str(out)])
    assert code == 1
    rows = load(out)["rows"]
    assert [(row["case"], row["impl"]) for row in rows] == [
        ("tiny B=1 S=64", "hf_eager"),
        ("tiny B=2 S=64", "hf_static_compile"),
    ]
    assert all("torch" in row["status"] for row in rows)


def test_static_cache_holds_the_longest_sequence():
    for context, tokens in ((512, 32), (100, 7), (64, 1)):
        case = hf_decode.Case(1, context, "static_compile")
        length = hf_decode.default_cache_len(case, tokens)
        longest = (context - tokens // 2) + tokens
        assert longest <= length < longest + 16
        assert length % 16 == 0


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--case", "1:64"], "not BATCH:CONTEXT:IMPL: '1:64'"),
        (["--case", "1:64:fast"], "IMPL one of eager, static_compile"),
        (["--case", "0:64:eager"], "must be positive"),
        (["--case", "1:64:eager", "--batch", "2"], "give one or the other"),
        (["--model", "tiny", "--context", "20"], "context must be in 21..992, got 20"),
        (["--context", "512", "--max-cache-len", "512"], "at least 528, got 512"),
        (["--tokens", "0"], "at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(argv, complaint, capsys):
    with pytest.raises(SystemExit):
        hf_decode.parse_args(argv)
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_live_on_a_cpu(tmp_path):
    out = tmp_path / "hf.json"
    command = [sys.executable, "-m", "benchmarks.baselines.hf_decode", "--model", "tiny"]
    command += ["--device", "cpu", "--dtype", "float32", "--tokens", "4", "--repeats", "2"]
    command += ["--case", "1:64:eager", "2:48:eager", "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    for row in load(out)["rows"]:
        assert row["status"] == "ok"
        assert row["n"] == 8
        assert 0 < row["p10"] <= row["ms"] <= row["p90"]
        assert row["rel_err"] <= 1e-4
