"""Metrics from ranks: the collected cases, the twin, and what holds for any ranking."""

import numpy as np
import pytest
from core_cases import MANY, SEEDS, csr
from hypothesis import given

from hnlm_ref import _core, reference

RECALL, NDCG, PRECISION, HIT, MRR, MAP = range(6)


def metrics(scores, masked, test, ks):
    """Every metric [6, n_k, U] of dense scores, by way of the lists."""
    frame = lambda rows: (np.cumsum([0, *map(len, rows)]), np.array([i for row in rows for i in row], np.int32))  # noqa: E731
    lists, _ = _core.topk_scores(np.array(scores, np.float32), *frame(masked), max(ks))
    return _core.user_metrics(_core.ranks_in_lists(lists, *frame(test)), frame(test)[0], np.array(ks))


SIX = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


@pytest.mark.parametrize(
    ("case", "scores", "masked", "test", "ks", "metric", "expected"),
    [
        ("C01", [SIX], [[]], [[0, 2, 5]], [1, 3, 5], RECALL, [[1 / 3], [2 / 3], [2 / 3]]),
        ("C01", [SIX], [[]], [[0, 2, 5]], [1, 3, 5], NDCG, [[1.0], [0.703918], [0.703918]]),
        ("C01", [SIX], [[]], [[0, 2, 5]], [1, 3, 5], PRECISION, [[1.0], [2 / 3], [0.4]]),
        ("C01", [SIX], [[]], [[0, 2, 5]], [1, 3, 5], HIT, [[1.0]] * 3),
        (
            "C02",
            [[9, 1, 1, 8, 7, 6], [9, 8, 1, 8.5, 2, 3]],
            [[], []],
            [[0, 1, 2]] * 2,
            [3],
            NDCG,
            [[0.469279, 0.703918]],
        ),
        ("C04", [[1] * 5], [[]], [[3]], [1, 3, 5], NDCG, [[0.0], [0.0], [0.430677]]),
        ("C06", [SIX], [[0, 1]], [[2, 4]], [1, 2, 3], RECALL, [[0.5], [0.5], [1.0]]),
        ("C06", [SIX], [[0, 1]], [[2, 4]], [1, 2, 3], NDCG, [[1.0], [0.613147], [0.919721]]),
        ("C08", [SIX[:4]], [[0, 1]], [[3]], [2, 10], NDCG, [[0.63093], [0.63093]]),
        ("C08", [SIX[:4]], [[0, 1]], [[3]], [2, 10], PRECISION, [[0.5], [0.1]]),
        ("C09", [SIX[:4]] * 2, [[], [0]], [[0], []], [1, 2], PRECISION, [[1.0, np.nan], [0.5, np.nan]]),
        ("C12", [SIX, SIX], [[], []], [[0], [1, 3, 4, 5]], [2], RECALL, [[1.0, 0.25]]),
        ("by hand", [SIX], [[]], [[1, 4]], [2, 5], MRR, [[0.5], [0.5]]),
        ("by hand", [SIX], [[]], [[1, 4]], [2, 5], MAP, [[1 / 4], [(1 / 2 + 2 / 5) / 2]]),
    ],
)
def test_collected_cases(case, scores, masked, test, ks, metric, expected):
    assert np.allclose(metrics(scores, masked, test, ks)[metric], expected, atol=1e-6, equal_nan=True)


@MANY
@given(SEEDS)
def test_metrics_equal_the_twin_and_keep_their_bounds(seed):
    """Case C15, too: all in [0, 1], recall and hit never fall with K, precision times K is whole."""
    rng = np.random.default_rng(seed)
    n_users, n_items, k = int(rng.integers(1, 6)), int(rng.integers(1, 12)), int(rng.integers(1, 9))
    lists = np.array([rng.permutation(n_items + 3)[:k] - 3 for _ in range(n_users)], np.int32).clip(-1)
    held_out = csr(rng, n_users, n_items, 0.3)
    ranks = _core.ranks_in_lists(lists, *held_out)
    assert np.array_equal(ranks, reference.ranks_in_lists(lists, *held_out))
    ks = np.arange(1, k + 1)
    found = _core.user_metrics(ranks, held_out[0], ks)
    assert np.allclose(found, reference.user_metrics(ranks, held_out[0], ks), rtol=1e-12, atol=0, equal_nan=True)
    some = found[:, :, np.diff(held_out[0]) > 0]
    assert np.all((some >= 0) & (some <= 1 + 1e-12) & ~np.signbit(some))  # not -0.0 either
    assert np.all(np.diff(some[[RECALL, HIT]], axis=1) >= 0)
    hits = some[PRECISION] * ks[:, None]
    assert np.allclose(hits, hits.round())
