"""How much memory do two executors take beside what one takes, and are the weights there once?

The same model with the same number of KV pages, on one executor, on two, and with
`topology="auto"`, which keeps two for each phase; each engine in a process of its own, measured
after it has served some requests.

On a GPU `gb` is what the device gives back when a process ends, in turns: prefill executors, decode
executors, and with the engine the storage owner (weights, KV pages); what remains of all since
before the start is MPS. It needs no permission to look into other processes, and counts all that
they hold. One executor is charged only with what JAX's pool used at its peak, not with what the
pool holds in reserve: that makes `extra_gb` larger, not smaller.

On a CPU `gb` is the proportional set size (PSS) of each process, in which a page that n processes
map counts 1/n in each, and `mapped_gb` the part of it that is weights and KV pages, as far as they
were touched. `weights_counted` is the sum of that over the size of both; on a GPU it is 1 plus the
number of executors that hold as much as the weights.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import topologies
from benchmarks.engine_load import Load, random_requests, seats
from benchmarks.report import Report, add_arguments
from benchmarks.stopping import end_on_sigterm, say
from jpd import checkpoint
from jpd.engine import memory
from jpd.engine.build import Engine

GB = 1e9
MODULES = {"jpd.semi_pd.storage": "storage owner", "jpd.semi_pd.worker": "kept executor"}
"""What processes are that do not serve."""
MEMFD = re.compile(r"/memfd:")
MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
"""First line of a mapping in /proc/PID/smaps."""


def warm_up(engine: Engine, requests: int) -> None:
    """Runs requests of all sizes, so that what steps need is there."""
    longest = topologies.typical_length({"max_model_len": engine.config.max_model_len})
    work = random_requests(0, engine.model_config.vocab_size, (1, longest // 2), (8, 64))
    Load(engine.coordinator, itertools.islice(work, requests), requests).finish()


def shared_bytes(engine: Engine) -> dict[str, int]:
    """Size of weights and of KV pages."""
    from jax.numpy import dtype

    config, model = engine.config, engine.model_config
    pages = memory.page_bytes(config, model, dtype(config.dtype).itemsize) * config.num_pages
    return {"weights": checkpoint.param_bytes(model, config.dtype), "pages": pages}


# --- on a CPU --------------------------------------------------------------------------------


def parse_pss(rollup: str) -> int:
    """Bytes of the `Pss:` line of /proc/PID/smaps_rollup."""
    return 1024 * int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE).group(1))


def parse_mapped(smaps: str) -> int:
    """PSS in bytes of all anonymous files in /proc/PID/smaps."""
    total, inside = 0, False
    for line in smaps.splitlines():
        if MAPPING.match(line):
            inside = MEMFD.search(line) is not None
        elif inside and line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])
    return total


def family(pid: str = "self") -> Iterator[tuple[int, str]]:
    """This process and all that descend from it: pid, and module or command."""
    process = Path("/proc") / pid
    for tasks in process.glob("task/*/children"):
        for child in tasks.read_text().split():
            yield from family(child)
    words = (process / "cmdline").read_text().split("\0")
    module = words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name
    yield int(process.resolve().name), module


def host_memory(engine: Engine) -> list[dict[str, Any]]:
    """In the engine's process: name, `gb` and `mapped_gb` of each process of the engine."""
    roles = {}
    if hasattr(engine.topology, "shares"):
        for phase, seat in seats(engine).items():
            roles[seat.executor.pid] = f"{phase} executor"
    rows = []
    for pid, module in family():
        if module.startswith("multiprocessing") or "resource_tracker" in module:
            continue
        name = roles.get(pid) or MODULES.get(module, "coordinator")
        folder = Path("/proc") / str(pid)
        rows.append(
            {
                "name": name,
                "gb": parse_pss((folder / "smaps_rollup").read_text()) / GB,
                "mapped_gb": parse_mapped((folder / "smaps").read_text()) / GB,
            }
        )
    return rows


# --- on a GPU --------------------------------------------------------------------------------


def device_used_gb() -> float:
    """Memory of the first GPU that is in use, by all processes, once it no longer changes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    before = -1
    while True:  # a context is torn down for some time after its process is gone
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        used = int(done.stdout)
        if used == before:
            return used * (1 << 20) / GB
        before = used
        time.sleep(0.5)


def unused_pool_gb(engine: Engine) -> float:
    """In the process of a unified engine: what JAX's pool holds and never needed."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return max(0, stats["pool_bytes"] - stats["peak_bytes_in_use"]) / GB


def end_phase(engine: Engine, phase: str) -> None:
    """In the engine's process: ends the executors of a phase, kept ones too."""
    seats(engine)[phase].pool.close()


def device_memory(process: topologies.EngineProcess, topology: str) -> list[dict[str, Any]]:
    """Name and `gb` of each process of the engine, which is of no use afterwards."""
    if not topologies.can_switch(topology):
        used, unused = device_used_gb(), process.call(unused_pool_gb)
        return [{"name": "executor", "before": used - unused, "pool_reserve_gb": unused}]
    rows = []
    for phase in ("prefill", "decode"):
        used = device_used_gb()
        process.call(end_phase, phase)
        rows.append({"name": f"{phase} executor", "gb": used - device_used_gb()})
    return [*rows, {"name": "storage owner and MPS", "before": device_used_gb()}]


# --- both ------------------------------------------------------------------------------------


def measure(model: str, topology: str, sizes: dict[str, Any], *, on_gpu: bool) -> dict[str, Any]:
    """Builds an engine, and gives the processes of the table and the sizes of what they share."""
    idle_gb = device_used_gb() if on_gpu else 0.0
    arguments = topologies.engine_args(model, topology, **sizes)
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with topologies.EngineProcess(topologies.build, arguments, **env) as process:
        process.call(warm_up, sizes["max_num_seqs"])
        shared = process.call(shared_bytes)
        if not on_gpu:
            return {"processes": process.call(host_memory), "shared": shared}
        processes = device_memory(process, topology)
    for row in processes:
        if "before" in row:
            row["gb"] = row.pop("before") - idle_gb
    return {"processes": processes, "shared": shared}


def total_gb(found: dict[str, Any]) -> float:
    """Of all processes of an engine, from what `measure` gave for it."""
    return sum(row["gb"] for row in found["processes"])


def summarise(unified: dict[str, Any], semi_pd: dict[str, Any]) -> dict[str, float]:
    """The summary from what `measure` gave for both engines."""
    total = {"unified_gb": total_gb(unified), "semi_pd_gb": total_gb(semi_pd)}
    shared = {f"{name}_gb": nbytes / GB for name, nbytes in semi_pd["shared"].items()}
    executors = [r for r in semi_pd["processes"] if r["name"].endswith("executor")]
    mapped = [r["mapped_gb"] for r in semi_pd["processes"] if "mapped_gb" in r]
    if mapped:
        counted = sum(mapped) / (shared["weights_gb"] + shared["pages_gb"])
    else:
        counted = 1 + sum(r["gb"] >= shared["weights_gb"] for r in executors)
    return {
        "extra_gb": total["semi_pd_gb"] - total["unified_gb"],
        **total,
        **shared,
        "largest_executor_gb": max(r["gb"] for r in executors),
        "weights_counted": counted,
    }


def add_rows(report: Report, model: str, topology: str, found: dict[str, Any]) -> None:
    """A row for each process and one for all."""
    for row in found["processes"]:
        fields = {key: value for key, value in row.items() if key != "name"}
        report.add(f"{model} {row['name']}", topology, **fields)
    report.add(f"{model} all", topology, gb=total_gb(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semi_pd_memory")
    add_arguments(parser)
    topologies.add_arguments(parser)
    args = parser.parse_args()
    end_on_sigterm()
    report = Report(
        "semi_pd_memory",
        "How much memory do two executors take beside what one takes, and are the weights there "
        "once?",
        out=args.out,
    )
    on_gpu = topologies.on_gpu(report.env)
    model, sizes = topologies.sizes(args, report.env)
    found = {}
    for topology in ("chunked", "semi_pd", "auto"):
        say(f"measuring {topology}")
        try:
            found[topology] = measure(model, topology, sizes, on_gpu=on_gpu)
        except Exception as error:  # the other engine's table is worth having
            report.fail(model, topology, error)
        else:
            add_rows(report, model, topology, found[topology])
        report.save()
    if "chunked" in found and "semi_pd" in found:
        report.summary |= summarise(found["chunked"], found["semi_pd"])
    if "chunked" in found and "auto" in found:
        report.summary["auto_extra_gb"] = total_gb(found["auto"]) - total_gb(found["chunked"])
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
