"""Rankings of the whole catalogue: lists, ranks and lists from scores."""

import threading

import numpy as np
import pytest
from conftest import run_measured
from core_cases import MANY, SEEDS, agree_everywhere, csr
from hypothesis import given

from hnlm_ref import _core, reference


def model(rng):
    """Small whole numbers, so sums are exact and ties common."""
    n_users, n_items, d = int(rng.integers(0, 20)), int(rng.integers(0, 150)), int(rng.integers(0, 7))
    vectors = [rng.integers(-2, 3, (n, d)).astype(np.float32) for n in (n_users, n_items)]
    return vectors, csr(rng, n_users, n_items, rng.choice([0.0, 0.1, 0.6]))


@MANY
@given(SEEDS)
def test_lists_equal_the_twin_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    vectors, owned = model(rng)
    agree_everywhere("topk", reference.topk, *vectors, *owned, int(rng.choice([0, 1, 3, 20, 200])))


@MANY
@given(SEEDS)
def test_lists_from_scores_equal_the_twin(seed):
    rng = np.random.default_rng(seed)
    n_users, n_items = int(rng.integers(0, 6)), int(rng.integers(0, 200))
    scores = rng.choice([-np.inf, -2, -0.0, 0.0, 1, 5, np.inf, -3e38], (n_users, n_items)).astype(np.float32)
    if n_users and n_items and rng.random() < 0.05:
        scores[-1, rng.integers(n_items)] = np.nan
    owned = csr(rng, n_users, n_items, 0.2)
    agree_everywhere("topk_scores", reference.topk_scores, scores, *owned, int(rng.choice([0, 1, 3, 20, 300])))


@MANY
@given(SEEDS)
def test_ranks_equal_the_twin(seed):
    rng = np.random.default_rng(seed)
    vectors, owned = model(rng)
    held_out = csr(rng, len(vectors[0]), len(vectors[1]), rng.choice([0.02, 0.2, 0.6]))  # many are read from lists
    args = *vectors, *owned, *held_out, int(rng.choice([0, 1, 3, 20, 200]))
    agree_everywhere("test_ranks", reference.test_ranks, *args)


@pytest.mark.parametrize("kernel", _core.kernels())
def test_scores_of_any_floats_are_those_of_the_list_and_rank_alike(kernel):
    """Inexact sums: threads, batches and the rank counter must still see the very same float32 scores."""
    rng = np.random.default_rng(1)
    users, items = (rng.standard_normal((n, 33)).astype(np.float32) for n in (300, 2000))
    owned, *parts = (csr(rng, 300, 2000, share, odd=False) for share in (0.02, 0.005, 0.02))
    try:
        _core.use_kernel(kernel)
        lists, scores = _core.topk(users, items, *owned, 50, 2)
        assert np.abs(scores - np.take_along_axis(users @ items.T, lists, 1)).max() < 1e-4
        assert np.array_equal(lists[:7], _core.topk(users[:7], items, owned[0][:8], owned[1][: owned[0][7]], 50, 1)[0])
        ranks = [_core.test_ranks(users, items, *owned, *held_out, 50, 2) for held_out in parts]  # 10, 40 of a user
    finally:
        _core.use_kernel(_core.kernels()[0])
    for found, held_out in zip(ranks, parts, strict=True):
        assert np.array_equal(found, _core.ranks_in_lists(lists, *held_out))


def test_constant_scores_rank_by_item_number():
    """Case C04."""
    none = np.zeros(2, np.int64), np.zeros(0, np.int32)
    assert _core.topk_scores(np.ones((1, 5), np.float32), *none, 3)[0].tolist() == [[0, 1, 2]]
    zeros = np.zeros((1, 4), np.float32), np.zeros((300, 4), np.float32)
    assert _core.topk(*zeros, *none, 3)[0].tolist() == [[0, 1, 2]]


def test_masked_items_stay_out_however_low_the_others_score():
    """Cases C07 and C08."""
    scores = np.array([[-2e9, -1e9, -3e9, -4e9]], np.float32)
    owned = np.array([0, 1], np.int64), np.array([1], np.int32)
    assert _core.topk_scores(scores, *owned, 10)[0].tolist() == [[0, 2, 3] + [-1] * 7]


def test_a_non_finite_score_is_named():
    """Case C11."""
    scores = np.array([[np.nan, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32)
    none = np.zeros(3, np.int64), np.zeros(0, np.int32)
    with pytest.raises(ValueError, match=r"user 0 has 1 non-finite score$"):
        _core.topk_scores(scores, *none, 1)
    with pytest.raises(ValueError, match="item_emb: row 1 has 1 non-finite"):
        _core.topk(scores[1:, :2], np.array([[1, 2], [np.inf, 0]], np.float32), none[0][:2], none[1], 1)
    with pytest.raises(ValueError, match="can leave the range of float32"):
        _core.topk(np.full((1, 1), 1e30, np.float32), np.full((1, 1), 1e30, np.float32), none[0][:2], none[1], 1)


MEMORY = {
    "lists": "_core.topk(emb[:n], emb, *none(n), 20)",
    "long lists": "_core.topk(emb[:n], emb, *none(n), 1000)",
    "ranks": "_core.test_ranks(emb[:n], emb, *none(n), *held_out(n, 1), 20)",
    "ranks of many": "_core.test_ranks(emb[:n], emb, *none(n), *held_out(n, 30), 20)",
    "metrics": "_core.user_metrics(np.ones(30 * n, np.int32), held_out(n, 30)[0], np.array([20]))",
    "matches": "_core.match_items(half[:n], half, users[:n], *none(n), 20)",
    "uniform": "_core.sample_uniform(*held_out(n, 30), 20_000, many[: 60 * n] % n, 16, 0)",
    "popularity": "_core.sample_popularity(*held_out(n, 30), weights, many[: 60 * n] % n, 16, 0)",
    "filter": "_core.filter_candidates(*held_out(n, 30), many[: 60 * n] % n, candidates[: 60 * n])",
}


@pytest.mark.parametrize("job", MEMORY)
def test_no_job_takes_more_than_64_mb_beyond_its_inputs_and_outputs(job):
    """Case C17: the 1.6 GB of scores of 20,000 x 20,000 would show in the peak."""
    (extra,) = run_measured(f"""
import numpy as np
from hnlm_ref import _core
emb, users, weights = np.ones((20_000, 16), np.float32), np.arange(20_000, dtype=np.int32), np.ones(20_000)
half, many = emb.astype(np.float16), np.tile(users, 60)
candidates = np.zeros((len(many), 16), np.int32)
none = lambda n: (np.zeros(n + 1, np.int64), np.zeros(0, np.int32))
held_out = lambda n, m: (np.arange(n + 1, dtype=np.int64) * m, np.tile(np.arange(m, dtype=np.int32), n))
def call(n):
    made = {MEMORY[job]}
    return made if isinstance(made, tuple) else (made,)
call(50)
before = peak()
made = call(20_000)
print(peak() - before - sum(part.nbytes for part in made))
""")
    assert extra < 64e6


def test_python_goes_on_while_the_core_works():
    emb, none = np.ones((6000, 64), np.float32), (np.zeros(6001, np.int64), np.zeros(0, np.int32))
    worker = threading.Thread(target=_core.topk, args=(emb, emb, *none, 10, 1))
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
    assert steps > 1000
