"""What the sampler needs to know about each sequence, kept as NumPy rows. Imports no jax."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from jpd.types import SamplingParams

if TYPE_CHECKING:
    import jax

    Array = np.ndarray | jax.Array

PADDING_SLOT = -1
"""The slot of rows that only fill a bucket: greedy, nothing else, whatever was set before."""

_MASK64 = 2**64 - 1


@dataclass(frozen=True)
class SamplingInputs:
    """Sampling parameters of R rows, one per sequence that gets a token in this step."""

    temperature: Array
    """`[R]` float32; below 1e-5 the row is greedy."""
    top_k: Array
    """`[R]` int32; 0 keeps all tokens."""
    top_p: Array
    """`[R]` float32; 1 keeps all tokens."""
    min_p: Array
    """`[R]` float32."""
    presence_penalty: Array
    """`[R]` float32."""
    frequency_penalty: Array
    """`[R]` float32."""
    repetition_penalty: Array
    """`[R]` float32; 1 does nothing."""
    keys: Array
    """`[R, 2]` uint32: threefry key of the sequence, from `sequence_key`."""
    bias_ids: Array
    """`[R, K]` int32: tokens whose logits are changed, each at most once a row; -1 is unused."""
    bias_values: Array
    """`[R, K]` float32, added to the logits; -inf bans the token."""


_SCALARS = tuple(f.name for f in fields(SamplingInputs)[:7])


def sequence_key(seed: int, index: int) -> np.ndarray:
    """Random key of one sequence of a request.

    Two rounds of the splitmix64 finaliser (Steele, Lea and Flood, OOPSLA 2014), so neighbouring
    seeds and indices give unrelated keys, and the sequences of one request never share a key.

    Args:
      seed: 64-bit seed of the request; negative values are taken modulo 2**64.
      index: which of the request's `n` sequences, from 0.

    Returns:
      `[2]` uint32 threefry key data.
    """
    word = _mix(_mix(seed & _MASK64) + index)
    return np.array([word >> 32, word & 0xFFFFFFFF], np.uint32)


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)


class SamplingTable:
    """Sampling parameters of all running sequences, by slot.

    `set` is called once per admission; `rows` once per step, and only gathers.

    Args:
      num_slots: sequences that can run at once.
      bias_width: K, the most token ids that one sequence may bias or ban.
    """

    def __init__(self, num_slots: int, bias_width: int) -> None:
        self.num_slots = num_slots
        self.bias_width = bias_width
        # One row more than slots: the last one, which index -1 reaches, is the padding row.
        size = num_slots + 1
        self._scalars = {
            name: np.zeros(size, np.int32 if name == "top_k" else np.float32) for name in _SCALARS
        }
        self._scalars["top_p"][:] = 1
        self._scalars["repetition_penalty"][:] = 1
        self._keys = np.zeros((size, 2), np.uint32)
        self._bias_ids = np.full((size, bias_width), -1, np.int32)
        # Biases before and after min_tokens is reached: they differ in the banned tokens only.
        self._early_values = np.zeros((size, bias_width), np.float32)
        self._late_values = np.zeros((size, bias_width), np.float32)
        self._has_bias = np.zeros(size, np.bool_)
        self._min_tokens = np.zeros(size, np.int32)
        self._no_bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def set(
        self,
        slot: int,
        params: SamplingParams,
        key: np.ndarray,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        """Makes `slot` sample by `params`; nothing of its previous sequence stays.

        Until `params.min_tokens` tokens were generated, `eos_token_ids` and
        `params.stop_token_ids` are banned. As in vLLM, `ignore_eos` does not lift the ban.

        Args:
          slot: in `[0, num_slots)`.
          params: token ids in it must be below the vocabulary's size; the sampler cannot check.
          key: `[2]` uint32, from `sequence_key`.
          eos_token_ids: the model's end-of-sequence tokens.

        Raises:
          ValueError: `slot` is out of range, or more than `bias_width` tokens are biased or banned.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot={slot} is not allowed: [0, {self.num_slots})")
        late = dict(params.logit_bias or {})
        banned = {*eos_token_ids, *params.stop_token_ids} if params.min_tokens > 0 else set()
        ids = sorted(late.keys() | banned)
        if len(ids) > self.bias_width:
            raise ValueError(
                f"{len(ids)} tokens are biased or banned until min_tokens:"
                f" at most {self.bias_width} fit"
            )
        for name, column in self._scalars.items():
            column[slot] = getattr(params, name)
        self._keys[slot] = key
        self._bias_ids[slot] = -1
        self._late_values[slot] = 0
        self._bias_ids[slot, : len(ids)] = ids
        self._late_values[slot, : len(ids)] = [late.get(i, 0.0) for i in ids]
        self._early_values[slot] = self._late_values[slot]
        self._early_values[slot, : len(ids)][[i in banned for i in ids]] = -np.inf
        self._has_bias[slot] = bool(late)
        self._min_tokens[slot] = params.min_tokens

    def rows(self, slots: np.ndarray, generated: np.ndarray) -> SamplingInputs:
        """Parameters of one step, as NumPy arrays.

        When no row has a bias or a ban, `bias_ids` and `bias_values` are the same read-only
        arrays in every step of this R, so that a caller can keep their copies on the device
        (compare with `is`).

        Args:
          slots: `[R]` integers; `PADDING_SLOT` fills a bucket.
          generated: `[R]` integers: tokens generated so far, for min_tokens.
        """
        slots = np.asarray(slots)
        early = np.asarray(generated) < self._min_tokens[slots]
        if early.any():
            ids = self._bias_ids[slots]
            values = np.where(early[:, None], self._early_values[slots], self._late_values[slots])
        elif self._has_bias[slots].any():
            ids, values = self._bias_ids[slots], self._late_values[slots]
        else:
            ids, values = self._unbiased(len(slots))
        return SamplingInputs(
            **{name: column[slots] for name, column in self._scalars.items()},
            keys=self._keys[slots],
            bias_ids=ids,
            bias_values=values,
        )

    def _unbiased(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        if num_rows not in self._no_bias:
            shape = (num_rows, self.bias_width)
            ids, values = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
            ids.flags.writeable = values.flags.writeable = False
            self._no_bias[num_rows] = ids, values
        return self._no_bias[num_rows]
