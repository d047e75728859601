import itertools

import pytest

from rlalign.rollout.seeds import rain_seed, sample_seed


def test_every_field_of_the_key_matters():
    keys = itertools.product(range(4), ("a", "b", "a/1", ""), range(5), range(6))
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == 4 * 4 * 5 * 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_in_every_process_and_release():
    # Resume and replay depend on these very values.
    assert sample_seed(0, "gsm8k/17", 0, 0) == 5537809038500755615
    assert sample_seed(0, "gsm8k/17", 0, 0) == sample_seed(
        seed=0, prompt_id="gsm8k/17", index=0, step=0
    )


def test_bits_are_balanced():
    seeds = [sample_seed(7, "p", index, 3) for index in range(4000)]
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 2000) < 5 * 4000**0.5 / 2


def test_a_prompt_id_cannot_imitate_another_key():
    # Fixed-width fields first: no (index, step, id) reads like another one.
    assert sample_seed(0, "\x00" * 8, 0, 0) != sample_seed(0, "", 0, 0)


def test_integers_beyond_64_bits_are_refused():
    with pytest.raises(OverflowError):
        sample_seed(2**63, "p", 0, 0)


def test_every_field_of_a_search_s_key_matters():
    keys = itertools.product(range(2), ("a", "b"), range(3), range(3), range(2), range(3))
    seeds = {rain_seed(*key) for key in keys}
    assert len(seeds) == 2 * 2 * 3 * 3 * 2 * 3 and all(0 <= seed < 2**63 for seed in seeds)
