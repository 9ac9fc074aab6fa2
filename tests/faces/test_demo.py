"""The demo, on a tiny model: to its table, on a terminal and off it."""

import io
import re

import pytest
from rich.console import Console

from jpd import CompletionOutput, RequestMetrics, RequestOutput, box, demo


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setitem(demo.ENGINE, "compilation_cache_dir", "")


def test_lines_and_table(folder, capfd):
    assert demo.main([str(folder)]) == 0
    out, err = capfd.readouterr()
    assert "Loading weights" in err
    assert "executors: 100%" in err
    lines = out.splitlines()
    rows = [re.findall(r"[\w.\[\]-]+", line) for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == [f"[{i}]" for i in range(len(demo.PROMPTS))]
    for (_, max_tokens), (_, prompt_tokens, generated, ttft, tpot, finish) in zip(
        demo.PROMPTS, rows, strict=True
    ):
        assert int(prompt_tokens) > 0
        assert 0 < int(generated) <= max_tokens
        assert finish == ("length" if int(generated) == max_tokens else "stop")
        assert float(ttft) > 0
        assert tpot == "-" or float(tpot) > 0
    total, seconds, rate = re.fullmatch(
        r"(\d+) tokens in ([\d.]+) s: ([\d.]+) tokens/s, 4 sequences at a time", lines[-1]
    ).groups()
    assert int(total) == sum(int(row[2]) for row in rows)
    assert float(rate) == pytest.approx(int(total) / float(seconds), rel=0.1)

    # Each answer ends once, and the fifth prompt starts when one of the first four has ended.
    ends = [i for i, line in enumerate(lines) if re.fullmatch(r"\[\d\] .*\((length|stop)\)", line)]
    assert sorted(lines[i][:3] for i in ends) == [f"[{i}]" for i in range(len(demo.PROMPTS))]
    assert min(i for i, line in enumerate(lines) if line.startswith("[4]")) > ends[0]
    assert min(i for i, line in enumerate(lines) if line.startswith("[5]")) > ends[1]


def test_terminal(folder, monkeypatch, capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(demo, "Console", lambda: console)
    assert demo.main([str(folder)]) == 0
    text = screen.getvalue()
    assert "[5] waits" in text
    for i, (prompt, _) in enumerate(demo.PROMPTS):
        assert f"[{i}] {prompt[:30]}" in text
    assert "generated tokens" in text
    assert re.search(r"\d+ tokens in", capsys.readouterr().out)


def test_panel_shows_the_end_of_each_text():
    def output(text, finished):
        completion = CompletionOutput(0, text, token_ids=[1] * 7)
        return RequestOutput("0", None, [1], [completion], RequestMetrics(0.0), finished)

    panel = demo._Panel()
    panel.update(0, output(" was\n" + "x" * 100 + " the end", False))
    panel.update(1, output("", True))
    screen = io.StringIO()
    Console(file=screen, width=60).print(panel)
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert len(lines) == len(demo.PROMPTS)
    assert lines[0].startswith("[0] writes 7 tok xxx")
    assert lines[0].endswith("x the end")
    assert lines[1].startswith("[1] done   7 tok ")
    assert lines[5].startswith("[5] waits        The white whale")
    assert all(len(line) <= 60 for line in lines)


def test_errors(monkeypatch, tmp_path, capsys):
    assert demo.main([str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    monkeypatch.setattr(box, "path", lambda: tmp_path)
    assert demo.main([]) == 2
    assert "`python -m jpd.box.train` makes it" in capsys.readouterr().err
    assert demo.main(["--help"]) == 2
    assert "usage: python -m jpd.demo [MODEL]" in capsys.readouterr().err
