"""Ranking metrics: checked calls into the Rust core, per-user arrays, and paired tests between two runs.

Conventions (cases C01-C21): the whole catalogue is ranked except what is excluded for the user; score descending, then
item number ascending; recall divides by the number of held-out items |T_u|, also when it exceeds K; NDCG has binary
gain 1/log2(rank + 1) and an ideal list of min(K, |T_u|); precision divides by K; hit is 1 when at least one held-out
item is in the first K; MRR is the reciprocal rank of the first; MAP divides by min(K, |T_u|). Users with nothing held
out have NaN and are left out of means, and counted. Nothing is rounded before it is printed (case C18), and nothing is
ranked against a sample of items.
"""

from collections.abc import Callable, Sequence

import numpy as np

from hnlm_ref import _core
from hnlm_ref.artifacts import Csr
from hnlm_ref.console import UserError

METRICS = ("recall", "ndcg", "precision", "hit", "mrr", "map")  # the order of _core.user_metrics
N_RESAMPLES, N_FLIPS = 2_000, 10_000  # of the users' differences, for the interval and for p


def evaluate(
    user_emb: np.ndarray, item_emb: np.ndarray, exclude: Csr, held_out: Csr, ks: tuple[int, ...], n_threads: int = 0
) -> dict[str, np.ndarray]:
    """Metrics of every user for the scores user_emb @ item_emb.T, which are never held as a whole (case C17).

    user_emb  float32 [U, d];  item_emb  float32 [I, d]
    exclude   what can never be recommended to a user: the training items, and the validation items when testing
    held_out  the items to be found
    Returns   {"recall@10": float64 [U], ...} for each metric and each K, all from one pass (case G04)
    Raises    ValueError naming the first user or item with a non-finite vector (case C11)

    A user who took item 0 and is to be shown item 3 finds it in the second place:

    >>> exclude, held_out = (Csr.from_pairs(np.array([0]), np.array([item]), n_rows=1, n_cols=4) for item in (0, 3))
    >>> found = evaluate(np.ones((1, 1)), np.array([[9.0], [1.0], [3.0], [2.0]]), exclude, held_out, ks=(1, 2))
    >>> [round(float(found[column][0]), 4) for column in ("recall@1", "recall@2", "ndcg@2", "mrr@2")]
    [0.0, 1.0, 0.6309, 0.5]
    """
    user_emb, item_emb = (np.ascontiguousarray(table, np.float32) for table in (user_emb, item_emb))
    graphs = exclude.indptr, exclude.indices, held_out.indptr, held_out.indices
    return from_ranks(_core.test_ranks(user_emb, item_emb, *graphs, max(ks), n_threads), held_out, ks)


def recommend(
    user_emb: np.ndarray, item_emb: np.ndarray, exclude: Csr, k: int, n_threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The lists that `evaluate` judges: items int32 [U, min(k, I)], best first, scores float32; -1 and -inf pad."""
    user_emb, item_emb = (np.ascontiguousarray(table, np.float32) for table in (user_emb, item_emb))
    return _core.topk(user_emb, item_emb, exclude.indptr, exclude.indices, min(k, len(item_emb)), n_threads)


def from_ranks(ranks: np.ndarray, held_out: Csr, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The same from the 1-based rank of every held-out pair, int32 [held_out.nnz]; 0 where it is beyond the last K."""
    table = _core.user_metrics(ranks, held_out.indptr, np.asarray(ks, np.int64))  # [n_metrics, n_k, U]
    return {f"{name}@{k}": table[m, j] for m, name in enumerate(METRICS) for j, k in enumerate(ks)}


def mean(per_user: np.ndarray) -> float:
    """Mean over the users that have something held out; summed in user order, so equal for any number of threads."""
    kept = per_user[~np.isnan(per_user)]
    return float(kept.sum() / len(kept)) if len(kept) else float("nan")


# ---- two runs over the same users -------------------------------------------------------------------------------


def match_users(a: dict[str, float], b: dict[str, float], names: Sequence[str] = ("A", "B")) -> np.ndarray:
    """Two runs' values by raw user key, NaN where a user was not evaluated -> float64 [2, U], users in a's order.

    Raises UserError when a user evaluated in one run is not in the other: users are never dropped (case G02).
    """
    a, b = ({key: value for key, value in run.items() if value == value} for run in (a, b))
    for name, missing in zip(names, (b.keys() - a.keys(), a.keys() - b.keys()), strict=True):
        if missing:
            told = f"{len(missing)} users of the other run were not evaluated in {name}, for example {min(missing)!r}"
            raise UserError(f"{told}; compare runs of the same prepared data")
    return np.array([list(a.values()), [b[key] for key in a]])


def compare(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Paired comparison of a metric in two runs: mean of a - b, its 95 % bootstrap interval, `sign_flip_p(a, b)`."""
    p, diff = sign_flip_p(a, b), (a - b)[~np.isnan(a)]
    rng = np.random.default_rng(0)
    means = _blocks(lambda n: diff[rng.integers(0, len(diff), (n, len(diff)))].mean(1), N_RESAMPLES, len(diff))
    low, high = np.percentile(means, [2.5, 97.5])
    return {"users": len(diff), "difference": float(diff.mean()), "low": float(low), "high": float(high), "p": p}


def sign_flip_p(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p of the paired sign-flip permutation test between two per-user arrays (case G02).

    a, b  float64 [U], the same users in the same order, NaN in both for the same users
    Exact (all 2^n sign patterns) up to 16 users that differ, sampled with the identity counted above that.
    All differences zero give 1.
    Raises ValueError when the lengths or the users with NaN differ, or no user is left.

    >>> sign_flip_p(np.array([0.3, 0.2, 0.5]), np.array([0.1, 0.1, 0.4]))  # 2 of the 8 patterns go as far
    0.25
    """
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any() or np.isnan(a).all():
        raise ValueError(f"the two runs do not hold the same users: {a.shape} and {b.shape}")
    diff = (a - b)[~np.isnan(a)]
    diff = diff[diff != 0]
    observed = abs(diff.sum()) - 1e-12 * abs(diff).sum()  # sums in another order are ties, not smaller
    if len(diff) <= 16:
        signs = 1 - 2 * ((np.arange(2 ** len(diff))[:, None] >> np.arange(len(diff))) & 1)
        return float(np.mean(np.abs(signs @ diff) >= observed))
    rng = np.random.default_rng(0)
    n_bytes = (len(diff) + 7) // 8

    def flipped(n: int) -> np.ndarray:
        bits = np.unpackbits(rng.integers(0, 256, (n, n_bytes), np.uint8), axis=1, count=len(diff))
        return diff.sum() - 2 * (bits.astype(np.float64) @ diff)

    sums = _blocks(flipped, N_FLIPS, len(diff))
    return (1 + int((np.abs(sums) >= observed).sum())) / (N_FLIPS + 1)


def _blocks(sample: Callable[[int], np.ndarray], n_samples: int, width: int) -> np.ndarray:
    """`n_samples` numbers from `sample(n)`, asked for in blocks, so that n x width never exceeds about 32 MB."""
    n = max(1, (1 << 22) // width)
    return np.concatenate([sample(min(n, n_samples - start)) for start in range(0, n_samples, n)])


# ---- shares and their uncertainty -------------------------------------------------------------------------------


def share_interval(hits: np.ndarray, drawn: np.ndarray) -> tuple[float, float, float]:
    """A share sum(hits) / sum(drawn) and its 95 % interval, users being the independent units.

    hits, drawn  float64 [U] per user, hits <= drawn, something drawn
    Wilson's interval for the effective number of draws: a user's draws resemble each other, so their number is divided
    by the design effect (variance over users against that of independent draws), at least 1. Wilson's stays honest
    where nothing was hit: 0 of 100 gives [0, 0.037].
    """
    n = drawn.sum()
    p, z = hits.sum() / n, 1.959964
    variance = ((hits - p * drawn) ** 2).sum() / n**2
    effect = max(1.0, variance / (p * (1 - p) / n)) if 0 < p < 1 else 1.0
    n = n / effect
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return float(p), max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative counts: 0 all equal (or all zero), (n - 1) / n all on one.

    >>> gini(np.array([0, 0, 0, 8])), gini(np.array([2, 2, 2, 2]))
    (0.75, 0.0)
    """
    n, total = len(counts), counts.sum()
    place = 2 * np.arange(1, n + 1) - n - 1
    return float((place * np.sort(counts)).sum() / (n * max(total, 1)))
