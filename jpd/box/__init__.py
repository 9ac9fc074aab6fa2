"""The model in the box: a small Llama trained on public-domain novels, shipped with jpd.

`jpd.box.train` makes it again from the text in `jpd/box/text`.
"""

from pathlib import Path


def path() -> Path:
    """Folder of the shipped checkpoint, in Hugging Face layout."""
    return Path(__file__).parent / "model"
