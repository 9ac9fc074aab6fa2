"""Several growing texts on one output."""

from __future__ import annotations


class LinePrinter:
    """Prints several growing texts at once: whole lines, each with the label of its text."""

    def __init__(self, width: int = 72) -> None:
        self._width = width
        self._held: dict[str, str] = {}

    def write(self, label: str, text: str) -> None:
        """Prints what fills lines, and holds the rest back."""
        *lines, rest = (self._held.get(label, "") + text).split("\n")
        while len(rest) > self._width:
            cut = rest.rfind(" ", 1, self._width) + 1 or self._width
            lines.append(rest[:cut])
            rest = rest[cut:]
        for line in lines:
            if line.strip():
                print(label, line.rstrip(), flush=True)
        self._held[label] = rest

    def end(self, label: str, note: str) -> None:
        """Prints what was held back, and how the text ended."""
        print(label, f"{self._held.pop(label, '')} ({note})".lstrip(), flush=True)
