"""The forms in which callers give prompts, brought to one. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from jpd.errors import RequestError
from jpd.text import Tokenizer


def is_batch(prompts: Any) -> bool:
    """True for several prompts, False for one (text, token ids, or a dict of either)."""
    if isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__len__"):
        return False
    return (
        len(prompts) == 0
        or isinstance(prompts[0], str | Mapping | Sequence)
        or (getattr(prompts[0], "ndim", 0) == 1)
    )


def tokenize(prompt: Any, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """Text (if it came as text) and token ids of one prompt.

    Raises:
      RequestError: not a prompt, or text without a tokenizer.
    """
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys not in ({"prompt"}, {"prompt_token_ids"}, {"prompt", "prompt_token_ids"}):
            raise RequestError(
                f"a prompt dict has 'prompt' or 'prompt_token_ids', not {sorted(keys)}"
            )
        text = prompt.get("prompt")
        if "prompt" in prompt and not isinstance(text, str):
            raise RequestError(
                f"'prompt' of a prompt dict is text, not {type(text).__name__} {str(text)[:80]!r}"
            )
        if "prompt_token_ids" in prompt:
            return text, _ids(prompt["prompt_token_ids"])
        prompt = text
    if not isinstance(prompt, str):
        return None, _ids(prompt)
    if prompt == "":
        raise RequestError("the prompt is empty: at least one token is needed")
    if tokenizer is None:
        raise RequestError("a text prompt needs a tokenizer: skip_tokenizer_init=True was given")
    return prompt, tokenizer.encode(prompt)


def conversations(messages: Any) -> Sequence[Any]:
    """The conversations in what was given, which is one of them or a list of several."""
    if isinstance(messages, Sequence) and all(
        isinstance(m, Sequence) and not isinstance(m, str) for m in messages
    ):
        return messages
    return [messages]


def chat(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a conversation of `{"role", "content"}`, ready for the model's turn.

    Raises:
      RequestError: no tokenizer, or not a conversation that its chat template takes.
    """
    if tokenizer is None:
        raise RequestError("chat needs a tokenizer: skip_tokenizer_init=True was given")
    return tokenizer.apply_chat_template(messages)


def _ids(values: Any) -> list[int]:
    try:
        given = list(None if isinstance(values, bytes) else values)
        ids = [index(v) for v in given]
    except TypeError:
        raise RequestError(
            f"a prompt is text or a list of token ids, not {type(values).__name__} "
            f"{str(values)[:80]!r}"
        ) from None
    if bool in map(type, given):  # an int to Python, but surely a mask or a flag gone astray
        at = [type(v) for v in given].index(bool)
        raise RequestError(f"token id {given[at]} at position {at} is a bool: an int is needed")
    return ids
