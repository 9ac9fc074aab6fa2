"""The sampler against plain sorts in float64, counted frequencies, and values worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jpd.engine import sampler
from jpd.engine.sampler_inputs import PADDING_SLOT, SamplingTable, sequence_key
from jpd.types import MAX_LOGPROBS, SamplingParams

VOCABS = [7, 1000, 4099]
ROWS = 96
sample = jax.jit(sampler.sample)
adjust_logits = jax.jit(sampler.adjust_logits)
keep_mask = jax.jit(sampler.keep_mask)


def make_inputs(params):
    """Inputs of one row per element of params, each with a key of its own."""
    table = SamplingTable(len(params), 16)
    for slot, p in enumerate(params):
        table.set(slot, p, sequence_key(0, slot))
    return table.rows(np.arange(len(params)), np.zeros(len(params)))


def make_history(prompts, outputs, width=12, garbage=3):
    """Keyword arguments of `sample`; entries of the history that are not known are `garbage`."""
    history = np.full((len(prompts), width), garbage, np.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        known = [*prompt, *output]
        history[row, : len(known)] = known
    return {
        "history": history,
        "prompt_lengths": np.array([len(p) for p in prompts], np.int32),
        "lengths": np.array([len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)]),
    }


def no_history(num_rows, width=12):
    return make_history([[0]] * num_rows, [[]] * num_rows, width)


def run(logits, params, *, generated=None, eos=()):
    """Samples after a prompt of token 0; padding rows and -inf logits bound the shapes in use."""
    logits = np.asarray(logits, np.float32)
    num_rows, vocab = logits.shape
    table = SamplingTable(num_rows, 16)
    for slot, p in enumerate(params):
        table.set(slot, p, sequence_key(0, slot), eos)
    slots = np.full(ROWS, PADDING_SLOT)
    slots[:num_rows] = np.arange(num_rows)
    counts = np.zeros(ROWS)
    counts[:num_rows] = 0 if generated is None else generated
    padding = ((0, ROWS - num_rows), (0, max(0, VOCABS[0] - vocab)))
    padded = np.pad(logits, padding, constant_values=-np.inf)
    result = sample(padded, table.rows(slots, counts), **no_history(ROWS))
    return jax.tree.map(lambda x: np.asarray(x)[:num_rows], result)


def random_params(rng):
    """Each option is off in some rows, ordinary or extreme in others."""
    return SamplingParams(
        temperature=float(rng.choice([0.2, 0.7, 1.0, 1.5, 10.0])),
        top_k=int(rng.choice([0, 1, 2, 5, 50, 900, 10**6])),
        top_p=float(rng.choice([1.0, 0.999, 0.9, rng.uniform(0.01, 0.99), 1e-6])),
        min_p=float(rng.choice([0.0, 0.0, 0.01, 0.3, 1.0])),
        presence_penalty=float(rng.choice([0.0, rng.uniform(-2, 2)])),
        frequency_penalty=float(rng.choice([0.0, rng.uniform(-2, 2)])),
        repetition_penalty=float(rng.choice([1.0, rng.uniform(0.5, 2.0)])),
        logit_bias={int(t): float(rng.uniform(-9, 9)) for t in rng.integers(0, 7, 3)},
    )


def random_logits(rng, num_rows, vocab):
    """Smooth logits in even rows, heavily tied ones (like those of a bfloat16 model) in odd."""
    logits = rng.normal(scale=rng.choice([1, 4], (num_rows, 1)), size=(num_rows, vocab))
    logits[1::2] = np.round(logits[1::2] * 2) / 2
    return logits.astype(np.float32)


def reference_adjust(logits, params, prompt, output):
    logits = logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *output}:
        r = params.repetition_penalty
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    for token in output:
        logits[token] -= params.frequency_penalty
    for token in set(output):
        logits[token] -= params.presence_penalty
    return logits


def reference_keep(adjusted, params):
    """Kept tokens, and those so near a boundary that float32 may decide them either way."""
    adjusted = adjusted.astype(np.float64)
    p = np.exp((adjusted - adjusted.max()) / params.temperature)
    keep = p >= params.min_p
    near = (np.abs(p - params.min_p) < 1e-5 * params.min_p) & (p < 1)
    if params.top_k:
        keep &= adjusted >= np.sort(adjusted)[::-1][min(params.top_k, len(adjusted)) - 1]
    if params.top_p < 1:
        p = np.where(keep, p, 0) / p[keep].sum()
        ranked = np.sort(p)[::-1]
        first_equal = np.searchsorted(-ranked, -p)
        above = np.concatenate([[0.0], np.cumsum(ranked)])[first_equal]
        keep &= above < params.top_p
        near |= (np.abs(above - params.top_p) < 1e-5) & (above > 0)
    return keep, near


def assert_frequencies(tokens, probs):
    """Chi-square test at the 0.1 % level; the seed is fixed, so it passes always or never."""
    counts = np.bincount(tokens, minlength=len(probs))
    assert len(counts) == len(probs)
    assert counts[probs == 0].sum() == 0
    counts, expected = counts[probs > 0], probs[probs > 0] * len(tokens)
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, len(counts) - 1) > 1e-3


@pytest.mark.parametrize("vocab", VOCABS)
def test_adjusted_logits_and_kept_set_equal_the_reference(vocab):
    rng = np.random.default_rng(vocab)
    undecided = decided_by_options = 0
    params = [random_params(rng) for _ in range(ROWS)]
    prompts = [list(rng.integers(0, vocab, rng.integers(1, 6))) for _ in params]
    outputs = [list(rng.integers(0, min(vocab, 9), rng.integers(0, 7))) for _ in params]
    logits = random_logits(rng, ROWS, vocab)
    inputs, history = make_inputs(params), make_history(prompts, outputs)
    adjusted = np.asarray(adjust_logits(logits, inputs, **history))
    keep = np.asarray(keep_mask(adjusted, inputs))
    tokens = np.asarray(sample(logits, inputs, **history).tokens)
    for i, p in enumerate(params):
        wanted = reference_adjust(logits[i], p, prompts[i], outputs[i])
        np.testing.assert_allclose(adjusted[i], wanted, rtol=2e-6, atol=2e-6)
        wanted, near = reference_keep(adjusted[i], p)
        differs = keep[i] != wanted
        assert not (differs & ~near).any(), p
        undecided += near.sum()
        decided_by_options += vocab - wanted.sum()
        assert keep[i, tokens[i]]
        assert keep[i, adjusted[i].argmax()]
    assert decided_by_options > ROWS * vocab / 4, "the options left nearly everything"
    assert undecided <= 1e-3 * ROWS * vocab, "too many boundary cases to mean anything"


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.6, top_k=5),
    SamplingParams(temperature=1.7, top_p=0.8),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=100),
    SamplingParams(temperature=1.3, top_k=8, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("params", FILTERS, ids=range(len(FILTERS)))
@pytest.mark.parametrize("over", ["keys", "positions"])
def test_frequencies_follow_the_distribution(params, over):
    draws, vocab = 20_000, 12
    logits = np.random.default_rng(5).normal(size=vocab).astype(np.float32)
    scaled = np.where(reference_keep(logits, params)[0], logits / params.temperature, -np.inf)
    probs = np.exp(scaled - scaled.max())
    one = make_inputs([params])
    inputs = jax.tree.map(lambda x: np.repeat(x, draws, axis=0), one)
    history = no_history(draws, width=1)
    if over == "keys":
        keys = np.stack([sequence_key(seed, n) for seed in range(draws // 4) for n in range(4)])
        inputs = type(inputs)(**{**vars(inputs), "keys": keys})
    else:
        history["lengths"] = np.arange(draws, dtype=np.int32)
        history["prompt_lengths"] = history["lengths"]
    result = sample(np.tile(logits, (draws, 1)), inputs, **history)
    assert_frequencies(np.asarray(result.tokens), probs / probs.sum())


def test_noise_is_gumbel_and_fine_where_it_wins():
    """Coarse noise would tie among the large values, and ties go to the lowest token id."""
    draws = 2**20
    noise = np.asarray(sampler._gumbel(jnp.asarray(sequence_key(0, 0)), 1, draws))
    sigma = np.pi / 6**0.5
    assert abs(noise.mean() - np.euler_gamma) < 4 * sigma / draws**0.5
    assert abs(noise.std() - sigma) < 0.01
    largest = np.sort(noise)[-1024:]
    assert abs(largest[0] - np.log(1024)) < 0.15
    assert len(np.unique(largest)) > 1020


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_noise_is_finite_for_any_random_bits(monkeypatch, bits):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, bits, dtype))
    noise = sampler._gumbel(jnp.asarray(sequence_key(0, 0)), 1, 4)
    assert np.isfinite(np.asarray(noise)).all()


def test_a_row_is_independent_of_batch_place_and_padding():
    rng = np.random.default_rng(3)
    rows, vocab = 8, 1000
    params = [random_params(rng) for _ in range(rows)]
    params[2] = SamplingParams(temperature=0)
    prompts = [list(rng.integers(0, vocab, 4)) for _ in params]
    outputs = [list(rng.integers(0, vocab, i)) for i in range(rows)]
    logits = random_logits(rng, rows, vocab)
    table = SamplingTable(rows, 16)
    for slot, p in enumerate(params):
        table.set(slot, p, sequence_key(11, slot))

    def tokens(slots, width, garbage):
        # A padding row holds poison: nothing of it may reach the others.
        pad = [s == PADDING_SLOT for s in slots]
        history = make_history(
            [prompts[s] for s in slots], [outputs[s] for s in slots], width, garbage
        )
        rows_of = np.where(np.array(pad)[:, None], np.nan, logits[slots])
        return np.asarray(
            sample(rows_of, table.rows(np.array(slots), np.zeros(len(slots))), **history).tokens
        )

    together = tokens(list(range(rows)), 12, 0)
    assert len(set(together)) > rows // 2
    for slot in range(rows):
        assert tokens([slot], 16, 999) == together[slot]
    order = [5, -1, 0, 7, 2, -1, 6, 1, 3, 4, -1]
    shuffled = tokens(order, 31, -7)
    for place, slot in enumerate(order):
        if slot != PADDING_SLOT:
            assert shuffled[place] == together[slot]


def test_key_and_position_choose_the_token():
    logits = np.zeros((ROWS, VOCABS[-1]), np.float32)
    inputs, history = make_inputs([SamplingParams()] * ROWS), no_history(ROWS)
    first = np.asarray(sample(logits, inputs, **history).tokens)
    later = np.asarray(sample(logits, inputs, **{**history, "lengths": np.full(ROWS, 2)}).tokens)
    assert len(set(first)) > 0.9 * ROWS
    assert (first != later).mean() > 0.9
    assert (first == np.asarray(sample(logits, inputs, **history).tokens)).all()


def test_penalties_by_hand():
    logits = np.array([[1.0, -1.0, 2.0, 0.5, -0.5, 0.0, 3.0]] * 2, np.float32)
    params = [
        SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25),
        SamplingParams(repetition_penalty=2.0, logit_bias={0: -2.0, 6: 1.0}),
    ]
    # 3 and 6 in row 0, and token ids of other models, stand beyond the known tokens only.
    history = make_history([[0, 1, 0], [0, 6]], [[2, 2, 1], []], width=9, garbage=3)
    history["history"][0, 6:] = [6, -5, 99_999]
    adjusted = adjust_logits(logits, make_inputs(params), **history)
    by_hand = [
        [0.5, -2.0 - 0.5 - 0.25, 1.0 - 1.0 - 0.25, 0.5, -0.5, 0.0, 3.0],
        [-2.0, -1.0, 2.0, 0.5, -0.5, 0.0, 2.0],  # the bias comes before the penalty
    ]
    np.testing.assert_array_equal(np.asarray(adjusted), np.array(by_hand, np.float32))


def test_greedy_takes_the_lowest_of_equal_tokens_after_bias():
    logits = np.array([[0.0, 2.0, 2.0, 1.0]] * 3)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logit_bias={0: 5.0}),
        SamplingParams(temperature=0, logit_bias={1: -100.0, 2: -100.0}),
    ]
    assert np.asarray(run(logits, params).tokens).tolist() == [1, 0, 3]
    assert np.asarray(sampler.greedy(jnp.asarray(logits))).tolist() == [1, 1, 1]


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bans_every_stop_token_until_reached(temperature, ignore_eos):
    params = SamplingParams(
        temperature=temperature,
        min_tokens=2,
        stop_token_ids=[4],
        logit_bias={4: 50.0, 1: -3.0},
        ignore_eos=ignore_eos,
    )
    logits = [[90.0, 2.0, 3.0, 80.0, 70.0]] * 4
    result = run(logits, [params] * 4, generated=[0, 1, 2, 3], eos=(0, 3))
    assert np.asarray(result.tokens).tolist() == [2, 2, 4, 4]
    assert not np.isnan(np.asarray(result.logprobs)).any()


def test_a_wholly_banned_row_is_defined_and_spoils_no_other():
    params = [
        SamplingParams(temperature=t, min_tokens=1, top_k=k, top_p=p, repetition_penalty=1.5)
        for t in (0.0, 1.0)
        for k in (0, 2)
        for p in (0.5, 1.0)
    ]
    params.append(SamplingParams(temperature=0))
    result = run([[0.0, 1.0, 2.0]] * 9, params, eos=(0, 1, 2), generated=[0] * 9)
    assert np.asarray(result.tokens).tolist() == [0] * 8 + [2]
    assert all(not np.isnan(x).any() for x in jax.tree.leaves(result))
    scaled = sampler._scale(jnp.full((1, 3), -jnp.inf), jnp.ones(1))
    assert np.asarray(scaled).tolist() == [[-np.inf] * 3]


def test_top_k_beyond_the_vocabulary_keeps_all_and_tiny_top_p_keeps_one():
    rng = np.random.default_rng(0)
    logits = rng.permuted(np.tile(np.linspace(-3, 3, 1000), (3, 1)), axis=1).astype(np.float32)
    params = [SamplingParams(top_k=10**6), SamplingParams(top_p=1e-9), SamplingParams(top_p=1e-60)]
    keep = np.asarray(keep_mask(logits, make_inputs(params)))
    assert keep.sum(axis=1).tolist() == [1000, 1, 1]
    assert np.asarray(run(logits, params).tokens)[1:].tolist() == logits[1:].argmax(1).tolist()


def test_ties_at_a_threshold_are_all_kept():
    logits = np.array([[2.0, 0.0, -0.0, 0.0, -1.0]] * 2, np.float32)
    params = [SamplingParams(top_k=2), SamplingParams(top_p=0.75)]  # p(2.0) is 0.69
    keep = np.asarray(keep_mask(logits, make_inputs(params)))
    assert keep.tolist() == [[True, True, True, True, False]] * 2


def test_a_threshold_separates_neighbouring_floats():
    logits = np.array([[1.0, np.nextafter(np.float32(1), 2), -2.0, 0.0, -0.5]] * 2, np.float32)
    params = [SamplingParams(top_k=1), SamplingParams(top_k=3)]
    keep = np.asarray(keep_mask(logits, make_inputs(params)))
    assert keep.tolist() == [[False, True, False, False, False], [True, True, False, True, False]]


def test_cold_rows_take_the_most_likely_token():
    cold = [SamplingParams(temperature=t) for t in (1e-60, 1e-30, 1e-5, 2e-5, 1e-3)]
    logits = np.random.default_rng(1).normal(size=(5, 1000)).astype(np.float32)
    logits[:3] *= 1e37  # differences overflow when divided
    assert (np.asarray(run(logits, cold).tokens) == logits.argmax(1)).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_and_ranks_are_those_of_the_raw_logits(vocab):
    rng = np.random.default_rng(vocab)
    rows, top = ROWS, min(vocab, MAX_LOGPROBS)
    logits = (4 * rng.normal(size=(rows, vocab))).astype(np.float32)
    params = [random_params(rng) for _ in range(rows)]
    result = run(logits, params)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    order = np.argsort(-exact, axis=1)
    picked = np.take_along_axis(exact, result.tokens[:, None], 1)
    np.testing.assert_allclose(result.logprobs, picked[:, 0], rtol=2e-6, atol=2e-6)
    assert (result.ranks == 1 + (exact > picked).sum(axis=1)).all()
    assert (result.top_tokens[:, :top] == order[:, :top]).all()
    wanted = np.take_along_axis(exact, order[:, :top], 1)
    np.testing.assert_allclose(result.top_logprobs[:, :top], wanted, rtol=2e-6, atol=2e-6)
    assert result.top_tokens.shape == result.top_logprobs.shape == (rows, MAX_LOGPROBS)
    assert (result.top_tokens[:, top:] == -1).all()
    assert (result.top_logprobs[:, top:] == -np.inf).all()


def test_equally_likely_tokens_share_a_rank():
    logits = [[1.0, 3.0, 3.0, 0.0]] * 2
    params = [SamplingParams(temperature=0, logit_bias={2: 9.0}), SamplingParams(temperature=0)]
    result = run(logits, params)
    assert np.asarray(result.tokens).tolist() == [2, 1]
    assert np.asarray(result.ranks).tolist() == [1, 1]


def test_program_has_no_sort_no_branch_and_no_callback():
    args = (np.zeros((4, 1000), np.float32), make_inputs([SamplingParams()] * 4))
    program = sample.lower(*args, **no_history(4)).as_text()
    assert "top_k" in program
    for operation in ("stablehlo.sort", "stablehlo.case", "stablehlo.if", "callback"):
        assert operation not in program
