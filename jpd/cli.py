"""The command `jpd`. Options are the fields of `EngineConfig`, `SamplingParams` and the benchmarks.

Nothing here imports jax before a command needs it, so that `jpd --help` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, UseAppendAction, arg, subcommand

import jpd
from jpd import EngineConfig, JpdError, SamplingParams, box
from jpd.bench import environment, latency, report, throughput
from jpd.config import Dtype
from jpd.console import LinePrinter
from jpd.errors import ConfigError
from jpd.simulate import command as simulate

if TYPE_CHECKING:
    from jpd import LLM


@dataclass(frozen=True, kw_only=True)
class _EngineOptions(EngineConfig):
    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = str(box.path())

    def __post_init__(self) -> None:
        """Checks nothing: `EngineConfig` does when it is built of these, outside of tyro."""

    def build(self) -> LLM:
        """Loads and compiles."""
        if self.model == str(box.path()):
            box.check_packaged_model()
        return jpd.LLM(**_fields(self, EngineConfig))


@dataclass(frozen=True, kw_only=True)
class _SamplingOptions(SamplingParams):
    # `--seed` is the engine's, as in vLLM.
    seed: Annotated[int | None, arg(name="sampling-seed")] = None
    stop: Annotated[tuple[str, ...], UseAppendAction] = ()

    def __post_init__(self) -> None:
        """Checks nothing: `SamplingParams` does when it is built of these, outside of tyro."""

    def build(self) -> SamplingParams:
        """The checked parameters."""
        return SamplingParams(**_fields(self, SamplingParams))


def _fields(options: Any, config: type) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(config)}


_Engine = Annotated[_EngineOptions, arg(name="")]
_Sampling = Annotated[_SamplingOptions, arg(name="")]


@dataclass(kw_only=True)
class _Command:
    debug: bool = False
    """Show where an error came from, as JPD_DEBUG=1 does."""


@dataclass(kw_only=True)
class Generate(_Command):
    """Continue prompts."""

    prompts: Annotated[tuple[str, ...], arg(name="prompt", aliases=["-p"]), UseAppendAction]
    """A prompt; repeat it for several."""
    stream: bool = False
    """Print text as it comes; several prompts take turns line by line."""
    json: bool = False
    """Print one JSON object for each prompt, with token ids, times and log-probabilities."""
    engine: _Engine = field(default_factory=_EngineOptions)
    sampling: _Sampling = field(default_factory=lambda: _SamplingOptions(max_tokens=128))

    def run(self) -> None:
        """Answers on stdout."""
        params = self.sampling.build()
        if not self.prompts:
            raise ConfigError("no prompt: give at least one -p TEXT")
        if self.stream and self.json:
            raise ConfigError("--stream and --json exclude each other")
        if params.logprobs is not None and not self.json:
            raise ConfigError(f"--logprobs {params.logprobs} is shown by --json only")
        llm = self.engine.build()
        if self.stream:
            self._stream(llm, params)
            return
        many = len(self.prompts) * params.n > 1
        for i, output in enumerate(llm.generate(list(self.prompts), params)):
            if self.json:
                print(json.dumps(_record(output)))
                continue
            for completion in output.outputs:
                if many:
                    print(f"--- {_label(i, completion.index, params.n)}")
                print(completion.text)

    def _stream(self, llm: LLM, params: SamplingParams) -> None:
        deltas = llm.stream(list(self.prompts), params)
        if len(self.prompts) * params.n == 1:
            for delta in deltas:
                print(delta.text, end="", flush=True)
            print()
            return
        printer = LinePrinter()
        for delta in deltas:
            label = _label(int(delta.request_id), delta.index, params.n)
            printer.write(label, delta.text)
            if delta.finish_reason is not None:
                printer.end(label, delta.finish_reason)


@dataclass(kw_only=True)
class Chat(_Command):
    """Talk to the model: Ctrl-C ends an answer, /reset the conversation, /exit the chat."""

    engine: _Engine = field(default_factory=_EngineOptions)
    sampling: _Sampling = field(default_factory=lambda: _SamplingOptions(max_tokens=256))

    def run(self) -> None:
        """Reads a line, streams the answer, until the input ends."""
        params = self.sampling.build()
        for name, only in (("n", 1), ("logprobs", None)):
            if getattr(params, name) != only:
                raise ConfigError(f"--{name} {getattr(params, name)} has no meaning in a chat")
        llm = self.engine.build()
        history: list[dict[str, str]] = []
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                history.clear()
                continue
            if not line:
                continue
            history.append({"role": "user", "content": line})
            try:
                answer = self._answer(llm, history, params)
            except jpd.RequestError as error:
                history.pop()
                print(f"jpd: error: {error}; /reset starts anew", file=sys.stderr)
                continue
            history.append({"role": "assistant", "content": answer})

    def _answer(self, llm: LLM, history: list[dict[str, str]], params: SamplingParams) -> str:
        """Prints the answer as it comes; Ctrl-C ends it, and what was said stays."""
        deltas, texts = llm.stream({"prompt_token_ids": llm.chat_tokens(history)}, params), []
        with _interrupts() as interrupts:
            for delta in deltas:
                texts.append(delta.text)
                print(delta.text, end="", flush=True)
                if interrupts:
                    deltas.close()
        print()
        return "".join(texts)


@dataclass(kw_only=True)
class _BenchCommand(_Command):
    json: Path | None = None
    """File for the numbers."""
    engine: _Engine = field(default_factory=_EngineOptions)


@dataclass(kw_only=True)
class Latency(_BenchCommand):
    """Time of one batch, alone on the engine."""

    bench: Annotated[latency.LatencyOptions, arg(name="")] = field(
        default_factory=latency.LatencyOptions
    )

    def run(self) -> None:
        """Measures, prints and writes."""
        llm = self.engine.build()
        result = latency.run(llm, self.bench)
        report.show(f"jpd bench latency: batches of {self.bench.batch_size}", result)
        print(f"a batch takes {1e3 * result['avg_latency']:.2f} ms on average")
        if self.json is not None:
            report.write(self.json, llm, self.bench, result)


@dataclass(kw_only=True)
class Throughput(_BenchCommand):
    """Tokens a second, when all requests are there at the start."""

    bench: Annotated[throughput.ThroughputOptions, arg(name="")] = field(
        default_factory=throughput.ThroughputOptions
    )

    def run(self) -> None:
        """Measures, prints and writes."""
        llm = self.engine.build()
        result = throughput.run(llm, self.bench)
        report.show("jpd bench throughput", result)
        if self.json is not None:
            report.write(self.json, llm, self.bench, result)


@dataclass(kw_only=True)
class Simulate(_BenchCommand):
    """Serve a workload in virtual time: the real coordinator on a model of the GPU's latencies.

    MODEL needs no more than its config.json.
    """

    bench: Annotated[simulate.SimulateOptions, arg(name="")] = field(
        default_factory=simulate.SimulateOptions
    )

    def run(self) -> None:
        """Simulates, prints and writes."""
        result = simulate.run(EngineConfig(**_fields(self.engine, EngineConfig)), self.bench)
        simulate.show(result)
        if self.json is not None:
            simulate.write(self.json, result)


@dataclass(kw_only=True)
class Bench:
    """Measure the engine with prompts of random tokens."""

    what: Annotated[
        Annotated[Latency, subcommand("latency")] | Annotated[Throughput, subcommand("throughput")],
        arg(name=""),
        OmitSubcommandPrefixes,
    ]

    def run(self) -> None:
        """Runs the benchmark."""
        self.what.run()


@dataclass(kw_only=True)
class Convert(_Command):
    """Write a model as an Orbax checkpoint, which loads faster and keeps jpd's layout."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a Hugging Face or Orbax checkpoint, or a Hugging Face name when online."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write; new or empty."""
    dtype: Dtype = "auto"
    """Type of the weights; "auto" takes the checkpoint's."""
    show_progress: bool = True
    """A progress bar, on stderr."""

    def run(self) -> None:
        """Loads and writes."""
        from jpd import checkpoint

        source = checkpoint.resolve_folder(self.model)
        config, params = checkpoint.load(source, dtype=self.dtype, show_progress=self.show_progress)
        checkpoint.save_orbax(config, params, self.out, source)
        print(f"wrote {self.out}")


@dataclass(kw_only=True)
class Calibrate(_Command):
    """Find a model's unified softmax values from real prompts; the engine then uses them."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a Hugging Face or Orbax checkpoint, or a Hugging Face name when online."""
    prompts: Path
    """Text file with a prompt on each line."""
    max_tokens: int = 2048
    """Tokens of a prompt that are looked at."""
    plot: bool = True
    """Draw a histogram of each layer's scores beside the checkpoint (needs jpd[bench])."""
    dtype: Dtype = "auto"
    """Type of weights and activations; "auto" takes the checkpoint's."""

    def run(self) -> None:
        """Writes jpd_phi.json, and jpd_phi.svg, beside the checkpoint."""
        from jpd import calibrate, checkpoint
        from jpd.text import Tokenizer

        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} is not allowed: an int >= 1")
        try:
            lines = self.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.prompts} cannot be read: {error}") from error
        folder = checkpoint.resolve_folder(self.model)
        tokenizer = Tokenizer.load(folder)
        texts = [tokenizer.encode(line) for line in lines if line.strip()]
        if not any(texts):
            raise ConfigError(f"{self.prompts} has no prompt: a line with text is needed")
        config, params = checkpoint.load(folder, dtype=self.dtype)
        limit = min(self.max_tokens, config.max_position)
        observed = calibrate.observe(config, params, [ids[:limit] for ids in texts])
        path = checkpoint.save_phi(folder, observed.phi(), observed.as_json())
        print(f"wrote {path}: {observed.prompts} prompts, {observed.tokens} tokens")
        low, high = observed.lse_min.min(), observed.lse_max.max()
        print(f"log-sum-exp of a row of scores: {low:.1f} to {high:.1f}")
        if self.plot:
            figure = path.with_suffix(".svg")
            drawn = calibrate.plot(observed, figure)
            print(f"wrote {figure}" if drawn else "no plot: matplotlib (jpd[bench]) is missing")


@dataclass(kw_only=True)
class Env(_Command):
    """Print versions, devices and what jpd can use of them."""

    json: bool = False
    """As one JSON object."""

    def run(self) -> None:
        """Prints; never fails for what is missing."""
        # Only a look: nothing that runs on the GPU should lose its memory to it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        found = environment.describe()
        if self.json:
            print(json.dumps(found, indent=2))
            return
        for name, value in found.items():
            if isinstance(value, dict):
                print(f"{name}:")
                for key, entry in value.items():
                    print(f"  {key}: {_plain(entry)}")
            else:
                print(f"{name}: {_plain(value)}")


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _label(prompt: int, index: int, n: int) -> str:
    return f"[{prompt}]" if n == 1 else f"[{prompt}.{index}]"


def _record(output: jpd.RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    times = {"ttft_s": metrics.ttft_s, "tpot_s": metrics.tpot_s}
    return {**dataclasses.asdict(output), **times}


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C, so that an answer ends between two deltas, with all its text printed."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)


def _lines() -> Iterator[str]:
    """What the user types, or the lines of a file or pipe."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` editing and history
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


Command = OmitSubcommandPrefixes[
    Annotated[Generate, subcommand("generate")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Simulate, subcommand("simulate")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Env, subcommand("env")]
]


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the return value is the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"jpd {jpd.__version__}")
        return 0
    try:
        command = tyro.cli(
            Command,
            prog="jpd",
            description="Large language model serving in JAX. `jpd --version` prints the version.",
            args=argv,
        )
        command.run()
    except JpdError as error:
        if os.environ.get("JPD_DEBUG") == "1" or "--debug" in argv:
            raise
        print(f"jpd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has enough
        # Python flushes stdout at its exit, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
