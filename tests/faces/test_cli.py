"""The command `jpd`: every command, its options, its errors."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import jpd
from jpd import EngineConfig, SamplingParams, box, checkpoint
from jpd.cli import main
from tests.faces.tiny import OPTIONS, SHAPES

PROMPTS = ["the cat sat", "a bird", "call me"]
GREEDY = ["--temperature", "0", "--max-tokens", "8", "--ignore-eos"]


@pytest.fixture
def texts(built, folder):
    """What greedy decoding makes of each prompt."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = jpd.LLM(str(folder), **SHAPES)
    texts = [output.outputs[0].text for output in llm.generate(PROMPTS, params)]
    assert all(text.strip() for text in texts)
    return texts


def prompt_options(prompts):
    return [part for prompt in prompts for part in ("-p", prompt)]


# ---- the command line itself


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jpd {jpd.__version__}\n"


def test_help_needs_no_jax():
    code = "import sys, jpd.cli; print('jax' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"


def test_every_option_is_there(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    names = [f.name for f in dataclasses.fields(EngineConfig)]
    names += [f.name for f in dataclasses.fields(SamplingParams)]
    expected = {"--" + n.replace("_", "-") for n in names} - {"--model", "--kernels"}
    expected |= {"--sampling-seed", "--kernels.decode-attention", "--prompt", "MODEL"}
    assert [name for name in sorted(expected) if name not in text] == []


def test_options_reach_the_configuration(monkeypatch):
    class Stop(Exception):
        """Ends the command before anything is loaded."""

    def fake(**kwargs):
        raise Stop(EngineConfig(**kwargs))

    monkeypatch.setattr(jpd, "LLM", fake)
    options = "--seed 3 --kernels.linear xla --batch-buckets 8 2 --no-enable-prefix-caching"
    with pytest.raises(Stop) as stop:
        main(["generate", "some/model", "-p", "x", *options.split(), "--dtype", "bfloat16"])
    assert stop.value.args[0] == EngineConfig(
        model="some/model",
        seed=3,
        kernels=jpd.KernelConfig(linear="xla"),
        batch_buckets=(2, 8),
        enable_prefix_caching=False,
        dtype="bfloat16",
    )


def test_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "-p", "x", "--max-num-seq", "3"])
    assert end.value.code == 2
    assert "--max-num-seqs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["generate"], "no prompt: give at least one -p TEXT"),
        (["generate", "-p", "x", "--top-p", "3"], "top_p=3.0 is not allowed: (0, 1]"),
        (["generate", "-p", "x", "--max-num-seqs", "0"], "max_num_seqs=0 is not allowed"),
        (["generate", "-p", "x", "--stream", "--json"], "--stream and --json exclude each other"),
        (["generate", "-p", "x", "--logprobs", "2"], "--logprobs 2 is shown by --json only"),
        (["chat", "--n", "2"], "--n 2 has no meaning in a chat"),
        (["generate", "{tmp}", "-p", "x"], "has no config.json"),
        (["convert", "{tmp}", "{tmp}/out"], "has no config.json"),
        (["bench", "latency", "{tmp}"], "has no config.json"),
    ],
)
def test_errors_are_one_line(options, message, tmp_path, capsys):
    assert main([option.format(tmp=tmp_path) for option in options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jpd: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    command = ["generate", str(tmp_path), "-p", "x"]
    with pytest.raises(jpd.ConfigError):
        main([*command, "--debug"])
    monkeypatch.setenv("JPD_DEBUG", "1")
    with pytest.raises(jpd.ConfigError):
        main(command)


def test_missing_packaged_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(box, "path", lambda: tmp_path / "gone")
    assert main(["generate", str(tmp_path / "gone"), "-p", "x"]) == 2
    assert "`python -m jpd.box.train` makes it" in capsys.readouterr().err


# ---- generate


def test_generate(built, folder, texts, capsys):
    assert main(["generate", str(folder), *OPTIONS, *GREEDY, "-p", PROMPTS[0]]) == 0
    assert capsys.readouterr().out == texts[0] + "\n"
    command = ["generate", str(folder), *OPTIONS, *GREEDY, *prompt_options(PROMPTS)]
    assert main(command) == 0
    expected = "".join(f"--- [{i}]\n{text}\n" for i, text in enumerate(texts))
    assert capsys.readouterr().out == expected


def test_generate_json(built, folder, texts, capsys):
    command = ["generate", str(folder), *OPTIONS, *GREEDY, *prompt_options(PROMPTS)]
    assert main([*command, "--json", "--logprobs", "1"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS
    assert [record["outputs"][0]["text"] for record in records] == texts
    completion = records[0]["outputs"][0]
    assert len(completion["token_ids"]) == len(completion["logprobs"]) == 8
    assert completion["finish_reason"] == "length"
    assert records[0]["ttft_s"] > 0
    assert records[0]["tpot_s"] > 0


def test_generate_stream(built, folder, texts, capsys):
    command = ["generate", str(folder), *OPTIONS, *GREEDY, "--stream"]
    assert main([*command, "-p", PROMPTS[0]]) == 0
    assert capsys.readouterr().out == texts[0] + "\n"
    assert main([*command, *prompt_options(PROMPTS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for i, text in enumerate(texts):
        own = [line for line in lines if line.startswith(f"[{i}] ")]
        assert own == [f"[{i}] {text} (length)".replace("]  ", "] ")]
    assert len(lines) == 3


def test_generate_several_sequences(built, folder, capsys):
    command = ["generate", str(folder), *OPTIONS, "-p", "the", "--n", "2", "--max-tokens", "4"]
    assert main([*command, "--sampling-seed", "7"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("--- [0.0]\n")
    assert "--- [0.1]\n" in first
    assert main([*command, "--sampling-seed", "7"]) == 0
    assert capsys.readouterr().out == first


# ---- chat


def test_chat(built, folder, monkeypatch, capsys):
    long = "the cat " * 40
    lines = ["the cat", "", "a bird", long, "/reset", "a bird", "/exit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(folder), *OPTIONS, *GREEDY]) == 0
    out, err = capsys.readouterr()
    llm = jpd.LLM(str(folder), **SHAPES)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def answer(*contents):
        roles = ["user", "assistant"] * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return llm.chat(messages, params)[0].outputs[0].text

    first = answer("the cat")
    expected = [first, answer("the cat", first, "a bird"), answer("a bird")]
    assert out == "".join(text + "\n" for text in expected)
    assert expected[1] != expected[2]
    assert err.count("jpd: error:") == 1
    assert "max_model_len=64" in err


def test_chat_on_a_terminal(built, folder, monkeypatch, capsys):
    answers = iter(["the cat"])

    def typed(prompt):
        assert prompt == "> "
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(folder), *OPTIONS, *GREEDY]) == 0
    assert capsys.readouterr().out.count("\n") == 2  # the answer, and the end of the input


def test_ctrl_c_ends_an_answer_not_the_chat(built, folder, monkeypatch, capsys):
    class Interrupted(io.StringIO):
        def write(self, text):
            if text.strip() and self.getvalue().count("\n") == 0:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = Interrupted()
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na bird\n"))
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["chat", str(folder), *OPTIONS, *GREEDY]) == 0
    first, second = out.getvalue().splitlines()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = jpd.LLM(str(folder), **SHAPES)
    messages = [{"role": "user", "content": "the cat"}]
    whole = llm.chat(messages, params)[0].outputs[0].text
    assert whole.startswith(first)
    assert 0 < len(first) < len(whole)
    assert second
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- convert, env


def test_convert_keeps_the_model(built, folder, engine, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--no-show-progress"]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    _, params = checkpoint.load(out)
    for new, old in zip(
        jax.tree.leaves(params), jax.tree.leaves(engine.executor.params), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    assert main(["convert", str(folder), str(out), "--no-show-progress"]) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_env(platform, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "JAX_PLATFORMS": platform}
    run = subprocess.run(
        [sys.executable, "-m", "jpd", "env", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["packages"]["jax"] == jax.__version__
    assert found["implementations"]["decode_attention"][-1] == "xla"
    assert found["kernels"]["kernels"].startswith("not used: ")
    assert found["compilation_cache_dir"] == str(tmp_path / ".cache/jpd/xla")
    assert found["devices"]


def test_reader_that_has_enough(folder):
    command = f"{sys.executable} -m jpd env | head -n 1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=600, check=False
    )
    first, status = run.stdout.splitlines()
    assert first == f"jpd: {jpd.__version__}"
    assert (status, run.stderr) in [("0", ""), ("141", "")]


def test_whole_program(folder):
    """One command as the shell runs it, from loading to the text."""
    run = subprocess.run(
        [sys.executable, "-m", "jpd", "generate", str(folder), *OPTIONS, *GREEDY, "-p", "a bird"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith("\n")
    assert len(run.stdout) > 1
