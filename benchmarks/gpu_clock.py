"""How fast the GPU's SMs are clocked while something runs, and what power the board draws.

Both are sampled by nvidia-smi in a process of its own, which only reads. Its power is a mean over
the second before (`power.draw` from Ampere on, by `nvidia-smi --help-query-gpu`), so what is said
of a time should begin a second into it.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from contextlib import suppress
from typing import Any, Self

import numpy as np

FIELDS = ("sm_mhz", "watts")
_QUERIED = "clocks.sm,power.draw"


def parse(line: str) -> tuple[float | None, float | None] | None:
    """MHz and watts of a line of nvidia-smi's; None for what it does not know.

    None in all if it is no such line, such as an error message.
    """
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(FIELDS):
        return None

    def number(text: str) -> float | None:
        with suppress(ValueError):
            return float(text)
        return None

    return number(parts[0]), number(parts[1])


class GpuClock:
    """Samples the first GPU that this process may use, while it is entered.

    Args:
        period_s: between two samples.
    """

    def __init__(self, period_s: float = 0.1) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        self._command = [
            "nvidia-smi",
            f"--id={visible or 0}",
            f"--query-gpu={_QUERIED}",
            "--format=csv,noheader,nounits",
            f"--loop-ms={round(1000 * period_s)}",
        ]
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._samples: list[tuple[float, float | None, float | None]] = []

    @property
    def running(self) -> bool:
        """Whether nvidia-smi is there and samples."""
        return self._process is not None and self._process.poll() is None

    def means(self, since_s: float, until_s: float) -> dict[str, float | None]:
        """The fields of a result row: means of the samples of a time of `time.monotonic`.

        None where there is none, or where nvidia-smi does not know.
        """
        samples = [of for at_s, *of in list(self._samples) if since_s <= at_s <= until_s]
        found: dict[str, float | None] = {}
        for i, name in enumerate(FIELDS):
            known = [sample[i] for sample in samples if sample[i] is not None]
            found[name] = float(np.mean(known)) if known else None
        return found

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found = parse(line)
            if found is not None:
                self._samples.append((time.monotonic(), *found))

    def __enter__(self) -> Self:
        with suppress(OSError):  # there is no nvidia-smi, or it cannot be run
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()
            assert self._process.stdout is not None
            self._process.stdout.close()
