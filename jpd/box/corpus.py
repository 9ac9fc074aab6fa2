"""The shipped novels as token ids, and the tokenizer that is trained on them."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1

_HELD_OUT = 20
"""One chapter in this many is kept for validation."""
# English contractions, words and digits with the space before them, runs of punctuation, runs of
# line breaks (so that the gap between two paragraphs is one token), other white space.
_PIECES = r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+"


@dataclass(frozen=True)
class Corpus:
    """Token ids of both parts; every chapter is `BOS ... EOS`."""

    train: np.ndarray
    """`[N]` int32."""
    validation: np.ndarray
    """`[M]` int32; whole chapters that are not in `train`."""
    paragraphs: np.ndarray
    """Indices into `train` of the token before each paragraph, ascending int32."""
    validation_bytes: int
    """UTF-8 bytes of the validation text."""


def chapters(folder: Path) -> list[str]:
    """Every chapter of the books in `folder`, in order of the files' names.

    Raises:
      FileNotFoundError: the folder holds no `*.txt.xz`.
    """
    files = sorted(folder.glob("*.txt.xz"))
    if not files:
        raise FileNotFoundError(f"no *.txt.xz in {folder}")
    books = (lzma.decompress(f.read_bytes()).decode() for f in files)
    return [chapter for book in books for chapter in book.strip().split("\n\n\n")]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer; encoding puts BOS in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: the text fills {tokenizer.get_vocab_size()}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def load(folder: Path, vocab_size: int) -> tuple[Tokenizer, Corpus]:
    """Trains the tokenizer on the training part and encodes both parts."""
    texts = chapters(folder)
    held_out = texts[_HELD_OUT // 2 :: _HELD_OUT]
    kept = [t for i, t in enumerate(texts) if i % _HELD_OUT != _HELD_OUT // 2]
    tokenizer = train_tokenizer(kept, vocab_size)

    def encode(part: list[str]) -> np.ndarray:
        ids = [[*e.ids, EOS_ID] for e in tokenizer.encode_batch(part)]
        return np.concatenate([np.asarray(i, np.int32) for i in ids])

    train = encode(kept)
    (gap,) = tokenizer.encode("\n\n", add_special_tokens=False).ids
    starts = np.flatnonzero((train == BOS_ID) | (train == gap)).astype(np.int32)
    size = sum(len(t.encode()) for t in held_out)
    return tokenizer, Corpus(train, encode(held_out), starts, size)
