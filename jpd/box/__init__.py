"""The model in the box: a small Llama trained on public-domain novels, shipped with jpd.

`jpd.box.train` makes it again from the text in `jpd/box/text`.
"""

from pathlib import Path

from jpd.errors import ConfigError


def path() -> Path:
    """Folder of the shipped checkpoint, in Hugging Face layout."""
    return Path(__file__).parent / "model"


def check_packaged_model() -> str:
    """`path()`, if the model is there.

    Raises:
      ConfigError: it is not.
    """
    if not (path() / "config.json").is_file():
        raise ConfigError(
            f"the model in the box is not in {path()}: `python -m jpd.box.train` makes it"
        )
    return str(path())
