"""From logits to tokens, inside the compiled step. Semantics are vLLM's.

The order is that of vLLM's v1 sampler: log-probabilities are taken from the model's own logits;
then logit bias and min_tokens bans; repetition, frequency and presence penalties; temperature;
min_p; top_k; top_p on what is left, renormalised; and one random token of the rest.

Nothing here sorts the vocabulary. top_k and top_p keep all tokens at or above a threshold, which
a binary search over the bits of float32 finds exactly: non-negative floats are ordered as their
bit patterns are, so the threshold is built from its highest bit down, and each bit costs one
masked sum over `[R, V]`. Tokens that tie at a threshold are all kept.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpd.engine.sampler_inputs import SamplingInputs
from jpd.types import MAX_LOGPROBS

GREEDY_TEMPERATURE = 1e-5
"""Rows below this temperature are greedy: dividing by less says nothing in float32."""

# Marks a prompt token in the counts of generated tokens; above every possible sequence length.
_IN_PROMPT = 1 << 30

jax.tree_util.register_dataclass(SamplingInputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """One token for each of R rows, and what the model thought of it."""

    tokens: jax.Array
    """`[R]` int32."""
    logprobs: jax.Array
    """`[R]` float32: log-probability of the token by the model's own logits."""
    ranks: jax.Array
    """`[R]` int32: 1 + tokens that the model holds more likely; equally likely ones share it."""
    top_tokens: jax.Array
    """`[R, 20]` int32: most likely tokens, best first (ties in any order); -1 beyond V."""
    top_logprobs: jax.Array
    """`[R, 20]` float32: their log-probabilities; -inf beyond V."""


def greedy(logits: jax.Array) -> jax.Array:
    """Most likely token `[R]` int32 of logits `[R, V]`; the lowest id of equal ones.

    Rows with NaN give some token below V.
    """
    # Two plain reductions: on a CPU they are 7 times faster than argmax, which XLA does not
    # vectorise (1.4 against 9.7 ms for R=64, V=32000 on two cores).
    last = logits.shape[-1] - 1
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    top = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == top, ids, last).min(axis=-1)


def sample(
    logits: jax.Array,
    inputs: SamplingInputs,
    *,
    history: jax.Array,
    prompt_lengths: jax.Array,
    lengths: jax.Array,
) -> Sampled:
    """Chooses the next token of each row.

    A token depends on its row alone: on logits, parameters, history and, for random rows, on
    `fold_in(key, length)`. Neither the other rows nor the row's place nor R matter (but for the
    float32 rounding of the sum that top_p is compared with, where XLA's order may follow R).
    A row whose tokens are all banned gets token 0.

    Args:
      logits: `[R, V]` float32 of the model.
      inputs: parameters of the rows.
      history: `[R, L]` int32: prompt and generated token ids; from `lengths` on, garbage.
      prompt_lengths: `[R]` int32: tokens of the prompt.
      lengths: `[R]` int32: known tokens, which is the index of the token to be sampled.
    """
    adjusted = adjust_logits(
        logits, inputs, history=history, prompt_lengths=prompt_lengths, lengths=lengths
    )
    scaled = _scale(adjusted, inputs.temperature)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(inputs.keys, lengths, logits.shape[-1])
    perturbed = jnp.where(keep_mask(adjusted, inputs), scaled + noise, -jnp.inf)
    is_greedy = (inputs.temperature < GREEDY_TEMPERATURE)[:, None]
    tokens = greedy(jnp.where(is_greedy, adjusted, perturbed))
    return _describe(logits, tokens)


def adjust_logits(
    logits: jax.Array,
    inputs: SamplingInputs,
    *,
    history: jax.Array,
    prompt_lengths: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Logits `[R, V]` after bias, bans and penalties; arguments as in `sample`."""
    num_rows, vocab = logits.shape
    rows = jnp.arange(num_rows)[:, None]

    def at(target: jax.Array, ids: jax.Array, used: jax.Array):
        # An index beyond the vocabulary is dropped; a negative one would count from the end.
        return target.at[rows, jnp.where(used, ids, vocab)]

    logits = at(logits, inputs.bias_ids, inputs.bias_ids >= 0).add(inputs.bias_values, mode="drop")

    position = jnp.arange(history.shape[1])
    known = position < lengths[:, None]
    in_prompt = position < prompt_lengths[:, None]
    counts = jnp.zeros(logits.shape, jnp.int32)
    counts = at(counts, history, known & in_prompt).set(_IN_PROMPT, mode="drop")
    counts = at(counts, history, known & ~in_prompt).add(1, mode="drop")
    generated = counts & (_IN_PROMPT - 1)

    factor = inputs.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(counts > 0, repeated, logits)
    logits -= inputs.frequency_penalty[:, None] * generated
    return logits - jnp.where(generated > 0, inputs.presence_penalty[:, None], 0)


def keep_mask(adjusted: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Tokens `[R, V]` that min_p, top_k and top_p leave, given the adjusted logits `[R, V]`."""
    vocab = adjusted.shape[-1]
    # Relative to the most likely token, which has exactly 1.
    probs = jnp.exp(_scale(adjusted, inputs.temperature))

    wanted = jnp.where(inputs.top_k > 0, jnp.minimum(inputs.top_k, vocab), vocab)
    order = _ordered_bits(adjusted)
    kth = _largest_threshold(order, jnp.int32(1), wanted, num_bits=32)
    keep = (order >= kth[:, None]) & (probs >= inputs.min_p[:, None])

    probs = jnp.where(keep, probs, 0)
    mass = jnp.maximum(inputs.top_p * probs.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    # A mass that no threshold reaches leaves the threshold at 0, so top_p = 1 drops nothing.
    mass = jnp.where(inputs.top_p < 1, mass, jnp.inf)
    bits = lax.bitcast_convert_type(probs, jnp.uint32)
    # 30 bits reach up to 2.0 (exclusive), and no relative probability is above 1.
    nucleus = _largest_threshold(bits, probs, mass, num_bits=30)
    return keep & (bits >= nucleus[:, None])


def _scale(adjusted: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits over temperature, shifted so that the largest is 0. Never NaN, as greedy rows
    divide by 1 and a row of -inf is not shifted."""
    top = adjusted.max(axis=-1, keepdims=True)
    shifted = adjusted - jnp.where(top == -jnp.inf, 0, top)
    divisor = jnp.where(temperature < GREEDY_TEMPERATURE, 1, temperature)
    return shifted / divisor[:, None]


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 x do; -0 and 0 are equal."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(
    values: jax.Array, weights: jax.Array, target: jax.Array, *, num_bits: int
) -> jax.Array:
    """Largest t `[R]` uint32 for which the weights of values >= t sum to >= target `[R]`.

    `values` `[R, V]` are below 2**num_bits; `weights` are `[R, V]` or one for all. Where even
    t = 0 falls short of the target, t is 0.
    """

    def set_next_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        bit = jnp.uint32(1) << (num_bits - 1 - i).astype(jnp.uint32)
        candidate = threshold | bit
        reached = jnp.where(values >= candidate[:, None], weights, 0).sum(axis=-1)
        return jnp.where(reached >= target, candidate, threshold)

    return lax.fori_loop(0, num_bits, set_next_bit, jnp.zeros(len(values), jnp.uint32))


def _gumbel(key_data: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise `[V]` float32 of one sequence at one position.

    Made from all 32 bits, with the fine end of float32 at the large values that win an argmax:
    `jax.random.gumbel` has 23 bits there, too coarse for vocabularies of 2**17 tokens.
    """
    # The implementation is named, so that a user's jax_default_prng_impl changes no token.
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl="threefry2x32"), position)
    bits = jax.random.bits(key, (vocab,), jnp.uint32)
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _describe(logits: jax.Array, tokens: jax.Array) -> Sampled:
    """Log-probabilities and ranks of tokens `[R]` under the model's own logits `[R, V]`."""
    vocab = logits.shape[-1]
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    # A stable top_k of more than 16 is a sort of the whole vocabulary in XLA's GPU backend.
    top, top_tokens = lax.top_k(logits, min(MAX_LOGPROBS, vocab), is_stable=False)
    padding = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
    return Sampled(
        tokens=tokens,
        logprobs=(chosen - normaliser)[:, 0],
        ranks=1 + (logits > chosen).sum(axis=-1, dtype=jnp.int32),
        top_tokens=jnp.pad(top_tokens, padding, constant_values=-1),
        top_logprobs=jnp.pad(top - normaliser, padding, constant_values=-jnp.inf),
    )
