"""The collected cases on ranking (C01-C21, G02, G04), other libraries as judges, and properties of every metric."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import run_measured
from hypothesis import given, settings
from hypothesis import strategies as st

from hnlm_ref import _core, metrics
from hnlm_ref.artifacts import Csr
from hnlm_ref.console import UserError

NAN = float("nan")


def csr(rows: list[list[int]], n_cols: int) -> Csr:
    lengths = [len(row) for row in rows]
    return Csr.from_pairs(
        np.repeat(np.arange(len(rows)), lengths),
        np.array([item for row in rows for item in row], int),
        len(rows),
        n_cols,
    )


def score_metrics(scores, mask, test, ks):
    """Metrics of a score matrix, as the case files give it."""
    table, exclude = np.array(scores, np.float32), csr(mask, len(scores[0]))
    lists = _core.topk_scores(table, exclude.indptr, exclude.indices, max(ks))[0]
    held_out = csr(test, len(scores[0]))
    return metrics.from_ranks(
        _core.ranks_in_lists(lists, held_out.indptr, held_out.indices), held_out, tuple(ks)
    ), lists


DESCENDING = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
# case: (scores, mask, test, {metric: mean over users})
CASES = {
    "C01 C03: three held out, found at ranks 1 and 3": (
        ([DESCENDING], [[]], [[0, 2, 5]]),
        {"recall@1": 1 / 3, "ndcg@1": 1.0, "precision@1": 1.0, "hit@1": 1, "recall@3": 2 / 3, "ndcg@3": 0.703918,
         "precision@3": 2 / 3, "hit@3": 1, "recall@5": 2 / 3, "ndcg@5": 0.703918, "precision@5": 0.4, "hit@5": 1,
         "mrr@5": 1, "map@3": (1 + 2 / 3) / 3, "map@1": 1},
    ),
    "C02: the ideal list holds all held-out items, not only the found ones": (
        ([[0.9, 0.1, 0.1, 0.8, 0.7, 0.6], [0.9, 0.8, 0.1, 0.85, 0.2, 0.3]], [[], []], [[0, 1, 2], [0, 1, 2]]),
        {"ndcg@3": 0.586598, "recall@3": 0.5},
    ),
    "C04: constant scores are no perfect ranking": (
        ([[1, 1, 1, 1, 1]], [[]], [[3]]),
        {"recall@1": 0, "recall@3": 0, "ndcg@3": 0, "recall@5": 1, "ndcg@5": 0.430677, "mrr@5": 0.25},
    ),
    "C06: training items are never in the list": (
        ([DESCENDING], [[0, 1]], [[2, 4]]),
        {"recall@1": 0.5, "ndcg@1": 1.0, "recall@2": 0.5, "ndcg@2": 0.613147, "recall@3": 1.0, "ndcg@3": 0.919721},
    ),
    "C07: scores below any finite stand-in for masked": (
        ([[-2e9, -1e9, -3e9, -4e9]], [[1]], [[0]]),
        {"recall@1": 1.0},
    ),
    "C08: K beyond what is left to recommend": (
        ([[0.4, 0.3, 0.2, 0.1]], [[0, 1]], [[3]]),
        {"recall@10": 1.0, "ndcg@10": 0.63093, "precision@10": 0.1},
    ),
    "C09: a user without test items is left out, not counted as zero": (
        ([[0.4, 0.3, 0.2, 0.1]] * 2, [[], [0]], [[0], []]),
        {"recall@1": 1.0, "ndcg@1": 1.0, "recall@2": 1.0, "precision@2": 0.5},
    ),
    "C12: means over users, not over pairs": (
        ([[0.9, 0.8, 0.1, 0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.1, 0.05, 0.01]], [[], []], [[0], [1, 3, 4, 5]]),
        {"recall@2": 0.625, "ndcg@2": 0.693426, "hit@2": 1.0},
    ),
    "C16: testing masks training and validation": (([[3, 2, 1]], [[0, 1]], [[2]]), {"recall@1": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hand_values_of_the_collected_cases(case):
    inputs, expected = CASES[case]
    found, _ = score_metrics(*inputs, sorted({int(name.partition("@")[2]) for name in expected}))
    assert {name: metrics.mean(found[name]) for name in expected} == pytest.approx(expected, abs=1e-6)


def test_one_hit_at_rank_one_of_three_is_no_perfect_ndcg():
    found, _ = score_metrics(*CASES["C02: the ideal list holds all held-out items, not only the found ones"][0], [3])
    assert found["ndcg@3"] == pytest.approx([0.469279, 0.703918], abs=1e-6)


def test_lists_hold_no_masked_no_repeated_item_and_pad_with_minus_one():
    _, lists = score_metrics([[0.4, 0.3, 0.2, 0.1]], [[0, 1]], [[3]], [2, 10])
    assert lists.tolist() == [[2, 3] + [-1] * 8]
    vectors = np.array([[1.0]]), np.array([[1.0], [3], [2]])  # asked for ten of three items, one of them known
    assert metrics.recommend(*vectors, Csr.from_pairs([0], [1], 1, 3), 10)[0].tolist() == [[2, 0, -1]]


def test_a_user_without_any_recommendation_counts_as_zero():
    """Case C10: user 1 owns the whole catalogue but for nothing; a mean over user 0 alone would be 1."""
    held_out = csr([[0], [1]], 2)
    ranks = _core.ranks_in_lists(np.array([[0], [-1]], np.int32), held_out.indptr, held_out.indices)
    found = metrics.from_ranks(ranks, held_out, (1,))
    assert [metrics.mean(found[name]) for name in ("recall@1", "precision@1")] == [0.5, 0.5]


def test_a_score_that_is_no_number_is_refused_by_user_and_count():
    with pytest.raises(ValueError, match=r"user 0.*1 non-finite score"):  # case C11
        score_metrics([[NAN, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], [[], []], [[1], [3]], [1])


def test_slices_and_transposed_tables_give_what_their_copies_give():  # case R02
    rng, one = np.random.default_rng(0), Csr.from_pairs([0, 1], [2, 0], 4, 6)
    user, item = (rng.normal(size=(n, 10)) for n in (4, 6))
    expected = metrics.recommend(user[:, ::2].astype(np.float32), item[:, ::2].astype(np.float32), one, 3)
    for views in ((user[:, ::2], item[:, ::2]), (user.T.copy().T[:, ::2], np.asfortranarray(item[:, ::2]))):
        for found, wanted in zip(metrics.recommend(*views, one, 3), expected, strict=True):
            assert np.array_equal(found, wanted)


def test_several_k_in_one_pass_equal_one_pass_for_each():
    rng = np.random.default_rng(0)  # case G04
    user_emb, item_emb = rng.normal(size=(30, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    held_out, exclude = csr([[u, u + 3] for u in range(30)], 40), csr([[u + 5] for u in range(30)], 40)
    together = metrics.evaluate(user_emb, item_emb, exclude, held_out, (5, 10, 20))
    for k in (5, 10, 20):
        for name, values in metrics.evaluate(user_emb, item_emb, exclude, held_out, (k,)).items():
            np.testing.assert_array_equal(together[name], values)
    lists, _ = metrics.recommend(user_emb, item_emb, exclude, 20)  # and the lists are those that were judged
    ranks = _core.ranks_in_lists(lists, held_out.indptr, held_out.indices)
    np.testing.assert_array_equal(metrics.from_ranks(ranks, held_out, (20,))["ndcg@20"], together["ndcg@20"])


def by_hand(ranking: list[int], held_out: set[int], k: int) -> dict[str, float]:
    """Every metric by its definition, one user, one loop."""
    hits = [place for place, item in enumerate(ranking[:k], 1) if item in held_out]
    ideal = sum(1 / np.log2(place + 1) for place in range(1, min(k, len(held_out)) + 1))
    return {
        "recall": len(hits) / len(held_out),
        "ndcg": sum(1 / np.log2(place + 1) for place in hits) / ideal,
        "precision": len(hits) / k,
        "hit": float(bool(hits)),
        "mrr": 1 / hits[0] if hits else 0.0,
        "map": sum((n + 1) / place for n, place in enumerate(hits)) / min(k, len(held_out)),
    }


def random_rankings():
    """30 users, 50 items, no ties; scores, held-out sets."""
    rng = np.random.default_rng(1)
    scores = rng.permuted(np.tile(np.arange(50), (30, 1)), axis=1).astype(np.float32)
    return scores, [sorted(rng.choice(50, rng.integers(1, 15), replace=False).tolist()) for _ in range(30)]


def test_every_metric_equals_a_plain_loop_on_random_rankings():
    scores, held_out = random_rankings()
    found, _ = score_metrics(scores, [[]] * 30, held_out, [1, 7, 20])
    for user in range(30):
        for k in (1, 7, 20):
            for name, value in by_hand(np.argsort(-scores[user]).tolist(), set(held_out[user]), k).items():
                assert found[f"{name}@{k}"][user] == pytest.approx(value, abs=1e-12)


RANX = """
import json, sys
from ranx import Qrels, Run, evaluate
data = json.load(sys.stdin)
qrels = Qrels({f"u{u}": {f"i{i}": 1 for i in items} for u, items in enumerate(data["held_out"])})
run = Run({f"u{u}": {f"i{i}": float(s) for i, s in enumerate(row)} for u, row in enumerate(data["scores"])})
names = [f"{name}@{k}" for name in ("recall", "ndcg", "precision", "hit_rate", "mrr", "map") for k in data["ks"]]
evaluate(qrels, run, names)
print(json.dumps({name: [run.scores[name][f"u{u}"] for u in range(len(data["scores"]))] for name in names}))
"""


def test_every_metric_equals_ranx():
    """ranx divides MAP by |T_u|, ours by min(K, |T_u|); all else is the same variant. Without its compiler: seconds."""
    pytest.importorskip("ranx", reason="ranx is not installed; pip install ranx")
    scores, held_out = random_rankings()
    ks = [1, 7, 20]
    found, _ = score_metrics(scores, [[]] * 30, held_out, ks)
    judge = subprocess.run(
        [sys.executable, "-c", RANX],
        input=json.dumps({"held_out": held_out, "scores": scores.tolist(), "ks": ks}),
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    sizes = np.array([len(items) for items in held_out])
    for name, values in json.loads(judge.stdout).items():
        metric, k = name.replace("hit_rate", "hit").split("@")
        scale = np.minimum(int(k), sizes) / sizes if metric == "map" else 1.0
        np.testing.assert_allclose(found[f"{metric}@{k}"] * scale, values, atol=1e-9)


def test_a_perfect_ranking_is_one_the_worst_is_zero_and_numbering_does_not_matter():
    scores = np.arange(10, dtype=np.float32)[None]
    best, _ = score_metrics(-scores, [[]], [[0, 1, 2]], [3, 5])
    worst, _ = score_metrics(scores, [[]], [[0, 1, 2]], [3, 5])
    for name in ("recall@3", "ndcg@3", "ndcg@5", "hit@3", "mrr@3", "map@3", "map@5", "precision@3"):
        assert (best[name], worst[name]) == ([1.0], [0.0])
    order = np.random.default_rng(0).permutation(10)
    again, _ = score_metrics(-scores[:, order], [[]], [np.argsort(order)[:3].tolist()], [3, 5])
    assert {name: values.tolist() for name, values in again.items()} == {n: v.tolist() for n, v in best.items()}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_metrics_stay_in_their_range_and_recall_and_hit_never_fall_with_k(seed):
    rng = np.random.default_rng(seed)  # case C15
    n_users, n_items = rng.integers(1, 6), rng.integers(2, 12)
    scores = rng.integers(0, 5, (n_users, n_items)).astype(np.float32)  # ties on purpose
    owner = rng.integers(0, 3, (n_users, n_items))  # 0 free, 1 known, 2 held out
    mask, test = ([np.flatnonzero(row == part).tolist() for row in owner] for part in (1, 2))
    ks = [1, 2, 3, 5, 20]
    found, _ = score_metrics(scores, mask, test, ks)
    for values in found.values():
        kept = values[~np.isnan(values)]
        assert ((kept >= 0) & (kept <= 1)).all()
    for name in ("recall", "hit"):
        for smaller, larger in pairwise(ks):
            assert not (found[f"{name}@{smaller}"] > found[f"{name}@{larger}"]).any()
    for k in ks:
        places = found[f"precision@{k}"] * k
        np.testing.assert_allclose(places, np.round(places), atol=1e-9)


def test_a_large_evaluation_never_holds_users_x_items():
    """Case C17: 12,000 x 12,000 scores would be 576 MB; the process may use 100 MB on top of what it starts with."""
    (extra,) = run_measured("""
import numpy as np
from hnlm_ref import metrics
from hnlm_ref.artifacts import Csr
n, rng = 12_000, np.random.default_rng(0)
tables = [rng.normal(size=(n, 16)).astype(np.float32) for _ in range(2)]
some = rng.choice(n, 500, replace=False)
held_out = Csr.from_pairs(some, some, n, n)
nothing = Csr(np.zeros(n + 1, np.int64), np.zeros(0, np.int32), n)
before = peak()
one = metrics.evaluate(*tables, nothing, held_out, (20,), n_threads=1)["ndcg@20"]
two = metrics.evaluate(*tables, nothing, held_out, (20,), n_threads=2)["ndcg@20"]
assert np.array_equal(one, two, equal_nan=True)
lists = metrics.recommend(tables[0], tables[1], nothing, 20)[0]
print(peak() - before)
""")
    assert extra < 100e6


# ---- two runs ---------------------------------------------------------------------------------------------------


def test_eight_equal_gains_have_the_exact_p_of_two_in_256_and_no_difference_has_one():
    a, b = np.full(8, 0.5), np.full(8, 0.4)  # case G02
    assert metrics.sign_flip_p(a, b) == 2 / 256 == 0.0078125
    assert metrics.sign_flip_p(b, a) == 2 / 256
    assert metrics.sign_flip_p(a, a) == 1.0


def test_the_exact_p_of_three_users_is_that_of_all_eight_sign_patterns():
    """Differences 3, 2, -1 sum to 4; of the eight signed sums +-6 and +-4 are at least as far out: 4 / 8."""
    assert metrics.sign_flip_p(np.array([3.0, 2.0, 0.0, NAN]), np.array([0.0, 0.0, 1.0, NAN])) == 0.5


def test_differences_that_sum_to_nothing_have_the_p_one():
    """0.1 three times and -0.3: in binary numbers they sum to 1e-17, and every sign pattern is as far out."""
    assert metrics.sign_flip_p(np.array([0.1, 0.1, 0.1, 0.0]), np.array([0.0, 0.0, 0.0, 0.3])) == 1.0
    assert metrics.sign_flip_p(np.array([0.1] * 15 + [-0.3] * 5), np.zeros(20)) == 1.0


def test_the_sampled_p_comes_near_the_exact_one():
    rng = np.random.default_rng(0)
    diff = rng.normal(0.3, 1, 16)
    exact = metrics.sign_flip_p(diff, np.zeros(16))
    padded = np.concatenate([diff, [1e-9]])  # a 17th user who changes nothing brings the sampling in
    assert metrics.sign_flip_p(padded, np.zeros(17)) == pytest.approx(exact, abs=0.02)
    assert metrics.sign_flip_p(np.ones(16), np.zeros(16)) == 2 / 2**16  # up to 16 it is exact
    # Of 40 equal differences a random pattern of signs is as far out once in 2^39: what is there is counted as one.
    assert metrics.sign_flip_p(np.ones(40), np.zeros(40)) == 1 / 10_001
    assert metrics.compare(padded, np.zeros(17))["p"] == metrics.sign_flip_p(padded, np.zeros(17))


def test_the_bootstrap_interval_is_that_of_the_normal_for_many_users():
    """1,000 users of mean 1 and deviation 2: 1.96 x 2 / sqrt(1000) = 0.124 to either side."""
    diff = np.random.default_rng(0).normal(size=1000)
    diff = 1 + 2 * (diff - diff.mean()) / diff.std()
    found = metrics.compare(diff, np.zeros(1000))
    assert found["difference"] == pytest.approx(1) and found["users"] == 1000 and found["p"] < 0.001
    assert (found["low"], found["high"]) == pytest.approx((1 - 0.124, 1 + 0.124), abs=0.01)
    diff += 1.5 * 2 / np.sqrt(1000) - 1  # 1.5 standard errors from 0, to either side of which lie 2 x 0.0668
    assert metrics.sign_flip_p(diff, np.zeros(1000)) == pytest.approx(0.1336, abs=0.01)


def test_runs_are_matched_by_user_key_and_a_missing_user_is_an_error():
    a, b = {"u1": 0.1, "u2": 0.2, "u3": NAN}, {"u2": 0.5, "u3": NAN, "u1": 0.4}
    np.testing.assert_array_equal(metrics.match_users(a, b), [[0.1, 0.2], [0.4, 0.5]])
    with pytest.raises(UserError, match="1 users of the other run were not evaluated in B, for example 'u1'"):
        metrics.match_users(a, {"u2": 0.5})
    with pytest.raises(UserError, match="not evaluated in A, for example 'u9'"):
        metrics.match_users(a, {**b, "u9": 0.1})
    with pytest.raises(ValueError, match="do not hold the same users"):
        metrics.sign_flip_p(np.array([1.0, NAN]), np.array([1.0, 1.0]))


# ---- shares -----------------------------------------------------------------------------------------------------


def test_the_interval_of_independent_draws_is_wilson_s():
    """Wilson (1927) for 10 of 100: 0.0552 to 0.1744; for 0 of 100: 0 to 0.0370."""
    drawn = np.ones(100)
    assert metrics.share_interval((np.arange(100) < 10) * 1.0, drawn) == pytest.approx((0.1, 0.0552, 0.1744), abs=1e-4)
    assert metrics.share_interval(np.zeros(100), drawn) == pytest.approx((0, 0, 0.0370), abs=1e-4)
    alike = np.ones(10), np.full(10, 10.0)  # one of every user's ten: no less spread is believed than independence has
    assert metrics.share_interval(*alike) == pytest.approx((0.1, 0.0552, 0.1744), abs=1e-4)


def test_draws_of_one_user_that_agree_count_as_one():
    """10 users with 10 equal draws each tell no more than 10 draws: Wilson for 3 of 10 is 0.1078 to 0.6032."""
    hits, drawn = np.array([10.0] * 3 + [0.0] * 7), np.full(10, 10.0)
    assert metrics.share_interval(hits, drawn) == pytest.approx((0.3, 0.1078, 0.6032), abs=1e-4)


def test_gini_is_zero_for_equal_counts_and_near_one_for_a_single_item():
    assert metrics.gini(np.array([2, 2, 2, 2])) == 0 and metrics.gini(np.array([0, 0, 0, 8])) == 0.75
    assert metrics.gini(np.array([1, 3])) == 0.25 and metrics.gini(np.zeros(3)) == 0
