"""Collects everything that is wrong with a checkpoint, to say it once."""

from __future__ import annotations

from jpd.errors import CheckpointError

_SHOWN = 20


class Faults:
    """Faults by kind, in the order in which the kinds were first met.

    Args:
      outcome: What the faults mean, e.g. "/models/llama cannot be loaded".
    """

    def __init__(self, outcome: str):
        self._outcome = outcome
        self._kinds: dict[str, list[str]] = {}

    def add(self, kind: str, entry: str) -> None:
        """Notes one fault; `kind` is a plural such as "missing tensors"."""
        self._kinds.setdefault(kind, []).append(entry)

    def check(self) -> None:
        """Raises `CheckpointError` with all faults if there are any."""
        if not self._kinds:
            return
        total = sum(len(entries) for entries in self._kinds.values())
        lines = [f"{self._outcome}, {total} fault{'s' * (total > 1)} found:"]
        for kind, entries in self._kinds.items():
            lines.append(f"  {kind} ({len(entries)}):")
            lines += [f"    {entry}" for entry in entries[:_SHOWN]]
            if len(entries) > _SHOWN:
                lines.append(f"    ... and {len(entries) - _SHOWN} more")
        raise CheckpointError("\n".join(lines))
