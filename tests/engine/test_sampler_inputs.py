"""Sequence keys and the table of sampling parameters, on the host."""

import numpy as np
import pytest

from jpd.engine.sampler_inputs import PADDING_SLOT, SamplingTable, sequence_key
from jpd.types import SamplingParams


def test_sequence_keys_are_splitmix64_and_differ():
    def mix(word):
        with np.errstate(over="ignore"):
            word = np.uint64(word) + np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return word ^ (word >> np.uint64(31))

    assert mix(0) == 0xE220A8397B1DCDAF  # first output of the published generator for seed 0
    assert sequence_key(0, 0).tolist() == [int(mix(mix(0))) >> 32, int(mix(mix(0))) & 0xFFFFFFFF]
    seeds = [*range(-50, 50), 2**62, 2**63 - 1, -(2**63)]
    keys = {tuple(sequence_key(s, n)) for s in seeds for n in range(20)}
    assert len(keys) == 20 * len(seeds)
    assert sequence_key(5, 1).dtype == np.uint32


def test_table_rows_follow_their_slots():
    table = SamplingTable(4, 3)
    table.set(1, SamplingParams(temperature=0.5, top_k=7, seed=1), sequence_key(1, 0))
    table.set(3, SamplingParams(top_p=0.25, logit_bias={8: 2.0}), sequence_key(3, 0))
    rows = table.rows(np.array([3, PADDING_SLOT, 1]), np.zeros(3))
    assert rows.temperature.tolist() == [1.0, 0.0, 0.5]
    assert rows.top_k.tolist() == [0, 0, 7]
    assert rows.top_p.tolist() == [0.25, 1.0, 1.0]
    assert rows.repetition_penalty.tolist() == [1.0, 1.0, 1.0]
    assert rows.bias_ids.tolist() == [[8, -1, -1], [-1] * 3, [-1] * 3]
    assert rows.bias_values.tolist() == [[2.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    assert (rows.keys == [sequence_key(3, 0), [0, 0], sequence_key(1, 0)]).all()
    dtypes = {name: str(value.dtype) for name, value in vars(rows).items()}
    assert {n for n, d in dtypes.items() if d != "float32"} == {"top_k", "keys", "bias_ids"}
    assert (dtypes["top_k"], dtypes["keys"], dtypes["bias_ids"]) == ("int32", "uint32", "int32")


def test_table_forgets_the_previous_sequence_of_a_slot():
    table = SamplingTable(2, 4)
    key = sequence_key(0, 0)
    table.set(0, SamplingParams(min_tokens=5, logit_bias={1: 1.0, 2: 2.0}), key, (9,))
    table.set(0, SamplingParams(logit_bias={3: 3.0}), key, (9,))
    rows = table.rows(np.array([0]), np.array([0]))
    assert rows.bias_ids.tolist() == [[3, -1, -1, -1]]
    assert rows.bias_values.tolist() == [[3.0, 0.0, 0.0, 0.0]]
    table.set(0, SamplingParams(), key, (9,))
    assert (table.rows(np.array([0]), np.array([0])).bias_ids == -1).all()


def test_table_shares_one_empty_bias_when_no_row_has_any():
    table = SamplingTable(3, 4)
    key = sequence_key(0, 0)
    table.set(0, SamplingParams(), key, (9,))
    table.set(1, SamplingParams(min_tokens=2), key, (9,))
    first = table.rows(np.array([0, 1]), np.array([0, 2]))
    again = table.rows(np.array([1, PADDING_SLOT]), np.array([7, 0]))
    assert first.bias_ids is again.bias_ids
    assert first.bias_values is again.bias_values
    banned = table.rows(np.array([0, 1]), np.array([0, 1]))
    assert banned.bias_ids.tolist() == [[-1] * 4, [9, -1, -1, -1]]
    assert banned.bias_values[1].tolist() == [-np.inf, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("slot", [-1, 2])
def test_table_refuses_a_slot_it_does_not_have(slot):
    with pytest.raises(ValueError, match=rf"slot={slot} is not allowed: \[0, 2\)"):
        SamplingTable(2, 4).set(slot, SamplingParams(), sequence_key(0, 0))


def test_table_refuses_more_biases_than_fit():
    params = SamplingParams(logit_bias={1: 1.0, 2: 1.0}, min_tokens=1, stop_token_ids=[3, 2])
    with pytest.raises(ValueError, match=r"3 tokens are biased or banned .* at most 2 fit"):
        SamplingTable(2, 2).set(0, params, sequence_key(0, 0))
