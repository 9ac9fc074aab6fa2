"""Tokens to text and back: tokenizer, chat template, incremental detokenizer, stop strings. No JAX.

Every token of the supported tokenizers stands for fixed bytes, apart from the space that
sentencepiece-like ones drop at the start of a text. So a text is its tokens' bytes joined and read
as UTF-8, and streaming it costs one table look-up and one step of a UTF-8 decoder a token, however
long the text is.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import Any

from jpd.errors import ConfigError, RequestError

# A folder with any of these can be asked for a tokenizer.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""All files of a model folder that `Tokenizer.load` may read."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # sentencepiece's visible space


class Tokenizer:
    """A model's tokenizer, with what the engine needs to know of it.

    Attributes:
      eos_token_ids: the tokenizer's own end-of-sequence id, or empty. A model may name more that
        end an answer, see `jpd.checkpoint.read_config`.
      bos_token_id: id of the beginning-of-sequence token, None if there is none.
      vocab_size: number of tokens including added ones. The model's logits may be wider (padding).
    """

    def __init__(self, hf: Any, name: str) -> None:
        """Wraps a fast `transformers` tokenizer; most callers want `Tokenizer.load`.

        Raises:
          ConfigError: `hf` is not backed by the `tokenizers` library, or its way of joining tokens
            to text is not one of byte-level BPE, sentencepiece with byte fallback, or metaspace.
        """
        if not getattr(hf, "is_fast", False):
            raise ConfigError(
                f"the tokenizer of {name} is a {type(hf).__name__} without a tokenizer.json; "
                "jpd needs one that the `tokenizers` library can load"
            )
        self.name = name
        self._hf = hf
        eos = hf.eos_token_id
        self.eos_token_ids: frozenset[int] = frozenset() if eos is None else frozenset({eos})
        self.bos_token_id: int | None = hf.bos_token_id
        self.vocab_size: int = len(hf)
        self._pieces = {skip: _Pieces(hf.backend_tokenizer, skip, name) for skip in (True, False)}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Loads the tokenizer of a model folder (`jpd.checkpoint.resolve_folder` finds a name's).

        Code that comes with a checkpoint is never executed, and nothing is fetched.

        Raises:
          ConfigError: the folder does not exist, or holds no tokenizer that can be read.
        """
        folder = Path(folder)
        if not any((folder / file).is_file() for file in _VOCABULARY_FILES):
            found = "holds no tokenizer" if folder.is_dir() else "is not a folder"
            raise ConfigError(f"{folder} {found}: need one of {', '.join(_VOCABULARY_FILES)} in it")
        # Its advice to install torch is not for users of jpd.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        # Malformed files surface as whatever the parser at fault raises, plain Exception included.
        except Exception as error:
            raise ConfigError(f"cannot load the tokenizer of {folder}: {error}") from error
        return cls(hf, str(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the model expects around a prompt."""
        return self._hf.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, unassigned ids nothing."""
        return self._pieces[skip_special_tokens].join(ids).decode("utf-8", "replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation in the form that the model was trained on.

        Args:
          messages: `{"role": ..., "content": ...}` each, both strings, oldest first.
          add_generation_prompt: end with what starts the assistant's turn.

        Raises:
          RequestError: the model has no chat template, or a message is malformed or one that the
            template refuses.
        """
        from jinja2 import TemplateError

        _check_messages(messages)
        if not self._hf.chat_template:
            raise RequestError(f"{self.name} has no chat template: send a plain prompt instead")
        try:
            return self._hf.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                return_dict=False,
            )
        except TemplateError as error:
            raise RequestError(f"the chat template of {self.name} refuses: {error}") from error


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come, and watches for stop strings.

    The deltas that `append` and `flush` return, joined, are `text`. They never hold part of a
    character, nor text that may turn out to be the beginning of a stop string. With several stop
    strings the match that ends first in the text counts, and of those that end together the
    longest, however tokens cut the text.

    Attributes:
      stopped: the stop string that ended the text, None as long as none did.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """
        Args:
          prompt_token_ids: tokens before the first appended one; they decide whether its leading
            space belongs to the text, and are not part of `text`.
          skip_special_tokens: leave special tokens out of the text.
          stop: non-empty strings that end the text.
          include_stop_str_in_output: keep the matched stop string at the end of the text.
          min_tokens: a stop string counts only if its last character comes with the token of this
            number (from 1) or a later one.
        """
        self.stopped: str | None = None
        self._pieces = tokenizer._pieces[skip_special_tokens]
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._tokens_before_stop = max(min_tokens - 1, 0)
        self._chunks: list[str] = []  # released text
        self._held = ""  # decoded text after it that may begin a stop string
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # The prompt's end may be half a character, which the first token then completes.
        tail = self._pieces.tail(prompt_token_ids)
        self._at_start = not tail
        self._utf8.decode(tail)

    @property
    def text(self) -> str:
        """All text so far, text held back included; a last incomplete character is not."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return self._chunks[0] + self._held if self._chunks else self._held

    def append(self, token_ids: Sequence[int]) -> str:
        """Adds tokens and returns the text that is now certain; "" once a stop string was met."""
        if not self._tokens_before_stop:
            return self._release(self._decode(token_ids), may_stop=True)
        early = token_ids[: self._tokens_before_stop]
        self._tokens_before_stop -= len(early)
        delta = self._release(self._decode(early), may_stop=False)
        late = token_ids[len(early) :]
        return delta + self.append(late) if late else delta

    def flush(self) -> str:
        """Ends the text and returns what was held back; an incomplete character becomes U+FFFD."""
        delta = self._release(self._utf8.decode(b"", final=True), not self._tokens_before_stop)
        delta += self._held
        if self._held:
            self._chunks.append(self._held)
            self._held = ""
        return delta

    def _decode(self, token_ids: Sequence[int]) -> str:
        if not self._at_start:
            pieces = self._pieces
            return self._utf8.decode(b"".join([pieces[token_id] for token_id in token_ids]))
        data = self._pieces.join(token_ids)
        self._at_start = not self._pieces.tail(token_ids)
        return self._utf8.decode(data)

    def _release(self, new: str, may_stop: bool) -> str:
        """Puts `new` after the held text; returns, and counts as released, what is certain."""
        if self.stopped is not None:
            return ""
        if not self._stop:
            delta = new
        else:
            text = self._held + new
            cut = self._find_stop(text, len(self._held)) if may_stop else None
            if cut is None:
                cut = self._partial_stop(text)
                self._held = text[cut:]
            else:
                self._held = ""
            delta = text[:cut]
        if delta:
            self._chunks.append(delta)
        return delta

    def _find_stop(self, text: str, old: int) -> int | None:
        """Where `text` ends if a stop string ends in it after its first `old` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None else min(best, candidate)
        if best is None:
            return None
        end, start, self.stopped = best
        return end if self._include_stop else start

    def _partial_stop(self, text: str) -> int:
        """Where the longest ending of `text` that some stop string begins with starts."""
        best = len(text)
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), best)
            while start >= 0:
                if stop.startswith(text[start:]):
                    best = start
                    break
                start = text.find(stop[0], start + 1, best)
        return best


class _Rule(Enum):
    """How tokens join to text. NO_PREFIX: the space mark that starts a text is not part of it."""

    BYTE_LEVEL = auto()
    BYTE_FALLBACK = auto()
    BYTE_FALLBACK_NO_PREFIX = auto()
    METASPACE = auto()
    METASPACE_NO_PREFIX = auto()


class _Pieces(dict[int, bytes]):
    """The bytes of each token, looked up once a token: `pieces[id]`.

    Differs from the `decode` of the `tokenizers` library in one case: byte-fallback tokens that are
    not UTF-8 together. The library then gives up the valid characters among them too, which no
    stream can do after it sent them.
    """

    def __init__(self, backend: Any, skip_special_tokens: bool, name: str) -> None:
        super().__init__()
        self._backend = backend
        self._special = {
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if skip_special_tokens and token.special
        }
        self._rule = _joining_rule(backend.decoder, name)

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = piece = self._piece(token_id)
        return piece

    def join(self, token_ids: Sequence[int]) -> bytes:
        """Bytes of `token_ids` as the start of a text."""
        pieces = [self[token_id] for token_id in token_ids]
        first = next((i for i, piece in enumerate(pieces) if piece), None)
        if first is not None and self._rule is _Rule.METASPACE_NO_PREFIX:
            token = self._backend.id_to_token(token_ids[first])
            pieces[first] = token.replace(_SPACE_MARK, "").encode()
        elif first is not None and self._rule is _Rule.BYTE_FALLBACK_NO_PREFIX:
            pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces)

    def tail(self, token_ids: Sequence[int]) -> bytes:
        """The last bytes of `token_ids`, enough to know whether they end within a character."""
        tail = b""
        for token_id in reversed(token_ids):
            tail = self[token_id] + tail
            if len(tail) >= 4:
                break
        return tail

    def _piece(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._rule is _Rule.BYTE_LEVEL:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token, written as itself
                return token.encode()
        fallback = self._rule in (_Rule.BYTE_FALLBACK, _Rule.BYTE_FALLBACK_NO_PREFIX)
        if fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE_MARK, " ").encode()


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character; this reads it back.

    Printable Latin-1 bytes stand for themselves, the others are numbered from U+0100 (GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _joining_rule(decoder: Any, name: str) -> _Rule:
    """Reads a `tokenizers` decoder; refuses one whose every step is not understood."""
    spec = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    joins = [step for step in steps if step["type"] != "Fuse"]
    match joins:
        case [{"type": "ByteLevel"}]:
            return _Rule.BYTE_LEVEL
        case [{"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}] if (
            mark == _SPACE_MARK
        ):
            return _Rule.METASPACE if scheme == "never" else _Rule.METASPACE_NO_PREFIX
        case [
            {"type": "Replace", "pattern": {"String": mark}, "content": " "},
            {"type": "ByteFallback"},
            *strip,
        ] if mark == _SPACE_MARK:
            match strip:
                case []:
                    return _Rule.BYTE_FALLBACK
                case [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
                    return _Rule.BYTE_FALLBACK_NO_PREFIX
    raise ConfigError(
        f"the tokenizer of {name} joins tokens by {spec}; jpd knows ByteLevel, Metaspace, and "
        "Replace + ByteFallback with or without Strip of one leading space"
    )


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            f"messages={messages!r} is not allowed: a list of at least one "
            '{"role": ..., "content": ...} is needed'
        )
    for i, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or set(message) != {"role", "content"}
            or not all(isinstance(value, str) for value in message.values())
            or not message["role"]
        ):
            raise RequestError(
                f"messages[{i}]={message!r} is not allowed: each message has exactly the keys "
                '"role" and "content", both strings'
            )
