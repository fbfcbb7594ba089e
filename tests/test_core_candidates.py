"""Sampling and filtering: word for word as the twin, exact, and never a known positive."""

import multiprocessing
import time

import numpy as np
import pytest
from conftest import run_measured
from core_cases import MANY, SEEDS, agree_everywhere, csr
from hypothesis import given

from hnlm_ref import _core, reference

NOBODY = np.array([0, 0], np.int64), np.zeros(0, np.int32)  # one user who owns nothing


def shares(draws, n_items):
    return np.bincount(draws.ravel(), minlength=n_items) / draws.size


def batch(rng):
    # In a long log the rows of all but the last users are compared in one window.
    n_users, n_items = int(rng.choice([1, 2, 5, 60])), int(rng.choice([1, 2, 5, 40, 130]))
    owned = csr(rng, n_users, n_items, rng.choice([0.0, 0.1, 0.5, 0.9]))
    users = rng.integers(0, n_users, rng.integers(0, 12)).astype(np.int32)
    return owned, n_items, np.sort(users) if rng.random() < 0.5 else users, int(rng.choice([0, 1, 2, 3, 9, 17]))


@MANY
@given(SEEDS)
def test_uniform_draws_equal_the_twin_word_for_word(seed):
    owned, n_items, users, n = batch(np.random.default_rng(seed))
    agree_everywhere("sample_uniform", reference.sample_uniform, *owned, n_items, users, n, seed)


@MANY
@given(SEEDS)
def test_popularity_draws_equal_the_twin_word_for_word(seed):
    rng = np.random.default_rng(seed)
    owned, n_items, users, n = batch(rng)
    weights = rng.choice([0.0, 0.3, 1.0, 7.0, 1000.0], n_items) * (rng.random() < 0.98)
    agree_everywhere("sample_popularity", reference.sample_popularity, *owned, weights, users, n, seed)


@MANY
@given(SEEDS)
def test_filtered_candidates_equal_the_twin(seed):
    rng = np.random.default_rng(seed)
    owned, n_items, users, n = batch(rng)
    candidates = rng.integers(-1, n_items, (len(users), n)).astype(np.int32)
    expected = reference.filter_candidates(*owned, users, candidates)
    for found, wanted in zip(_core.filter_candidates(*owned, users, candidates), expected, strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("n", [2**40, 2**60])
def test_nobody_gets_any_number_of_draws(n):
    nobody = np.zeros(1, np.int64), np.empty(0, np.int32)
    assert _core.sample_uniform(*nobody, 5, np.empty(0, np.int32), n, 0).shape == (0, n)
    assert _core.sample_popularity(*nobody, np.ones(5), np.empty(0, np.int32), n, 0).shape == (0, n)


def test_no_draw_is_a_known_positive_and_free_items_come_up_equally():
    """Case B03: 50 users, 40 items; each free item within five standard deviations of its share."""
    rng = np.random.default_rng(0)
    indptr, indices = csr(rng, 50, 40, 0.3)
    users = np.arange(2, 50, dtype=np.int32)
    draws = _core.sample_uniform(indptr, indices, 40, users, 20_000, 1)
    for user, row in zip(users, draws, strict=True):
        owned = indices[indptr[user] : indptr[user + 1]]
        expected = np.full(40, 1 / (40 - len(owned)))
        expected[owned] = 0
        assert np.all(np.abs(shares(row, 40) - expected) <= 5 * np.sqrt(expected / 20_000))


def test_one_free_item_of_ten_thousand_is_found_at_once():
    """Case B02."""
    indices = np.delete(np.arange(10_000, dtype=np.int32), 4321)
    args = np.array([0, 9999], np.int64), indices, 10_000, np.zeros(1, np.int32), 1000, 3
    start = time.process_time()
    assert np.all(_core.sample_uniform(*args) == 4321)
    assert time.process_time() - start < 0.1


def test_popularity_follows_the_exponent():
    """Case B06: degrees 8, 1, 1."""
    degrees, user = np.array([8.0, 1.0, 1.0]), np.zeros(1, np.int32)
    for alpha, expected in ((0.0, [1 / 3] * 3), (0.75, [0.704003, 0.147998, 0.147998]), (1.0, [0.8, 0.1, 0.1])):
        draws = _core.sample_popularity(*NOBODY, degrees**alpha, user, 100_000, 5)
        assert np.allclose(shares(draws, 3), expected, atol=0.01)
        owner = np.array([0, 1], np.int64), np.zeros(1, np.int32)
        draws = _core.sample_popularity(*owner, degrees**alpha, user, 100_000, 5)
        assert np.allclose(shares(draws, 3), [0, 0.5, 0.5], atol=0.01)


def test_a_user_with_everything_is_named():
    """Case B01."""
    indptr, indices = np.array([0, 1, 6], np.int64), np.array([0, 0, 1, 2, 3, 4], np.int32)
    with pytest.raises(ValueError, match=r"user 1 has no free item to draw \(5 of 5 items seen\)"):
        _core.sample_uniform(indptr, indices, 5, np.array([0, 1], np.int32), 3, 0)


@pytest.mark.parametrize("kernel", _core.kernels())
@pytest.mark.parametrize(("place", "item"), [(4, 3), (4, 2), (8, 300), (0, -1), (3, 300)])
def test_a_bad_row_is_found_wherever_it_lies(kernel, place, item):
    """Rows of 1, 2, 3, ... items, the first of which are compared in one window."""
    indptr = np.cumsum(np.arange(20))
    indices = np.concatenate([np.arange(n) for n in range(20)]).astype(np.int32)
    row = 9
    indices[indptr[row - 1] + place] = item
    try:
        _core.use_kernel(kernel)
        with pytest.raises((ValueError, IndexError), match="indices"):
            _core.sample_uniform(indptr, indices, 300, np.arange(19, dtype=np.int32), 2, 0)
        good = np.delete(np.arange(19, dtype=np.int32), row - 1)
        _core.sample_uniform(indptr, indices, 300, good, 2, 0)
    finally:
        _core.use_kernel(_core.kernels()[0])


def test_a_row_depends_on_seed_and_row_alone():
    """The items of a user are marked for 9 draws and looked up for 4; after 255 users a mark comes again."""
    n, each = 30_000, np.arange(1000)
    owned = 30 * np.arange(1001), (each[:, None] + 1000 * np.arange(30)).astype(np.int32).ravel()
    users = np.random.default_rng(2).integers(0, 1000, 5000).astype(np.int32)
    draws = _core.sample_uniform(*owned, n, users, 9, 7)
    assert np.array_equal(draws[:77], _core.sample_uniform(*owned, n, users[:77], 9, 7))
    assert np.array_equal(draws[:, :4], _core.sample_uniform(*owned, n, users, 4, 7))
    assert not np.array_equal(draws, _core.sample_uniform(*owned, n, users, 9, 8))


def test_out_is_filled_and_returned():
    out = np.full((4, 3), -7, np.int32)
    users = np.zeros(4, np.int32)
    assert _core.sample_uniform(*NOBODY, 50, users, 3, 9, out=out) is out
    assert np.array_equal(out, _core.sample_uniform(*NOBODY, 50, users, 3, 9))


def _sample(_):
    return _core.sample_uniform(*NOBODY, 1000, np.zeros(5000, np.int32), 8, 1, 2).sum()


def test_a_forked_loader_worker_draws_the_same():
    """Case B13: the child has its parent's memory but not its threads."""
    expected = _sample(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_sample, range(4)).get(timeout=60) == [expected] * 4


def test_a_worker_forked_while_a_pool_is_made_does_not_wait_for_it():
    """A child that would, ends by its alarm."""
    ends = run_measured("""
import os, signal, threading
import numpy as np
from hnlm_ref import _core
draw = lambda n: _core.sample_uniform(np.zeros(2, "i8"), np.zeros(0, "i4"), 9, np.zeros(1, "i4"), 1, 1, n)
draw(2)
maker = threading.Thread(target=lambda: [draw(n) for n in range(300, 306)])
maker.start()
while maker.is_alive():
    if not (child := os.fork()):
        signal.alarm(10)
        draw(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
""")
    assert ends and not any(ends)
