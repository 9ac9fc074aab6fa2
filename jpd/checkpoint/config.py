"""Where a model folder is and what its JSON files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jpd.errors import ConfigError
from jpd.models import ModelConfig, config_from_hf
from jpd.text import TOKENIZER_FILES

_SMALL_FILES = ("*.json", *(name for name in TOKENIZER_FILES if not name.endswith(".json")))
_WEIGHTS = "*.safetensors"
# Subfolders hold other formats of the same weights, `consolidated*` holds them a second time.
_NOT_FETCHED = ("*/*", "consolidated*")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ConfigError: the file cannot be read or holds something else; the message names the path.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_config(folder: str | Path) -> ModelConfig:
    """Reads `config.json`; end-of-sequence ids of `generation_config.json` win over its own.

    Raises:
      ConfigError: no `config.json`, one that is not JSON, or a model that jpd does not know.
    """
    folder = Path(folder)
    path, generation = folder / "config.json", folder / "generation_config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"{folder} {what}")
    try:
        config = config_from_hf(read_json(path))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if str(path) in message else f"{path}: {message}") from error
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if eos is None:
        return config
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise ConfigError(
            f"{generation}: eos_token_id={eos!r} is not allowed: an int or a list of ints "
            f"in [0, {config.vocab_size})"
        )
    return config.replace(eos_token_ids=tuple(dict.fromkeys(ids)))


def resolve_folder(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The folder itself, or the local copy of a Hugging Face repository of that name.

    Only JSON, safetensors and tokenizer files are fetched. With `HF_HUB_OFFLINE=1` a copy fetched
    earlier is used and the network is not. What no repository can be called is never asked for.

    Args:
      name_or_path: A folder, or "owner/name".
      weights: False fetches no safetensors: a tokenizer or dummy weights need none.

    Raises:
      ConfigError: it is neither a folder nor something that can be fetched.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{folder} is a file, not the folder of a model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = str(name_or_path)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(f"no such folder: {name!r}") from None
    try:
        copy = snapshot_download(
            name,
            allow_patterns=[*_SMALL_FILES, *([_WEIGHTS] if weights else [])],
            ignore_patterns=list(_NOT_FETCHED),
        )
    except Exception as error:  # HTTP, sockets, offline mode: no common base class
        raise ConfigError(
            f"{name!r} is not a folder, and fetching it from Hugging Face failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Path(copy)
