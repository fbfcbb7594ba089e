"""Ranking metrics: checked calls into the Rust core, per-user arrays, and paired tests between two runs.

Conventions (cases C01-C21): the whole catalogue is ranked except what is excluded for the user; score descending, then
item number ascending; recall divides by the number of held-out items |T_u|, also when it exceeds K; NDCG has binary
gain 1/log2(rank + 1) and an ideal list of min(K, |T_u|); precision divides by K; hit is 1 when at least one held-out
item is in the first K; MRR is the reciprocal rank of the first; MAP divides by min(K, |T_u|). Users with nothing held
out have NaN and are left out of means, and counted.
"""

import numpy as np

from hnlm_ref import _core
from hnlm_ref.artifacts import Csr

METRICS = ("recall", "ndcg", "precision", "hit", "mrr", "map")  # the order of _core.user_metrics


def evaluate(
    user_emb: np.ndarray,
    item_emb: np.ndarray,
    exclude: Csr,
    held_out: Csr,
    ks: tuple[int, ...] = (10, 20),
    n_threads: int = 0,
) -> dict[str, np.ndarray]:
    """Metrics of every user for the scores user_emb @ item_emb.T, which are never held as a whole (case C17).

    user_emb  float32 [U, d];  item_emb  float32 [I, d]
    exclude   what can never be recommended to a user: the training items, and the validation items when testing
    held_out  the items to be found
    Returns   {"recall@10": float64 [U], ...} for each metric and each K
    Raises    ValueError naming the first user or item with a non-finite vector (case C11)
    """
    ranks = _core.test_ranks(
        np.ascontiguousarray(user_emb, np.float32),
        np.ascontiguousarray(item_emb, np.float32),
        exclude.indptr,
        exclude.indices,
        held_out.indptr,
        held_out.indices,
        max(ks),
        n_threads,
    )
    return from_ranks(ranks, held_out, ks)


def from_ranks(ranks: np.ndarray, held_out: Csr, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The same from the 1-based rank of every held-out pair, int32 [held_out.nnz]; 0 where it is beyond the last K."""
    table = _core.user_metrics(ranks, held_out.indptr, np.asarray(ks, np.int64))  # [n_metrics, n_k, U]
    return {f"{name}@{k}": table[m, j] for m, name in enumerate(METRICS) for j, k in enumerate(ks)}


def mean(per_user: np.ndarray) -> float:
    """Mean over the users that have something held out; summed in user order, so equal for any number of threads."""
    kept = per_user[~np.isnan(per_user)]
    return float(kept.sum() / len(kept)) if len(kept) else float("nan")


def sign_flip_p(a: np.ndarray, b: np.ndarray, n_samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of the paired sign-flip permutation test between two per-user arrays (case G02).

    a, b     float64 [U], the same users in the same order, NaN in both for the same users
    Exact (all 2^n sign patterns) up to 16 users that differ, sampled with the identity counted above that.
    All differences zero give 1.
    Raises ValueError when the lengths or the users with NaN differ.
    """
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        raise ValueError(f"the two runs do not hold the same users: {a.shape} and {b.shape}")
    diff = (a - b)[~np.isnan(a)]
    diff = diff[diff != 0]
    if len(diff) == 0:
        return 1.0
    observed = abs(diff.sum()) * (1 - 1e-12)  # sums in another order are ties, not smaller
    if len(diff) <= 16:
        signs = 1 - 2 * ((np.arange(2 ** len(diff))[:, None] >> np.arange(len(diff))) & 1)
        return float(np.mean(np.abs(signs @ diff) >= observed))
    rng = np.random.default_rng(seed)
    beyond = 1 + sum(int(abs((rng.integers(0, 2, len(diff)) * 2 - 1) @ diff) >= observed) for _ in range(n_samples))
    return beyond / (n_samples + 1)
