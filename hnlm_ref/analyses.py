"""What stage 5 says beyond the metrics: groups of users and items, spread of the lists, false negatives."""

from collections import Counter

import numpy as np

from hnlm_ref import _core, metrics
from hnlm_ref.artifacts import Csr

HEAD = 0.2  # Choice: the head is the most popular fifth of the items


def equal_groups(counts: np.ndarray, n_groups: int) -> np.ndarray:
    """Cut into groups with equal shares of the total, smallest counts first: int64 [len(counts)], numbers of groups.

    A member belongs to the group in which the middle of its share falls, so one that holds more than a group's share
    leaves a group empty. Ties are cut in order of number.

    >>> equal_groups(np.array([6, 1, 1, 2, 2]), 2)
    array([1, 0, 0, 0, 0])
    """
    order = np.argsort(counts, kind="stable")
    middle = np.cumsum(counts[order]) - counts[order] / 2
    groups = np.empty(len(counts), np.int64)
    groups[order] = middle * n_groups / max(counts.sum(), 1)
    return groups


def describe_groups(groups: np.ndarray, counts: np.ndarray, tested: np.ndarray, n_groups: int) -> list[dict]:
    """Size of every group; `tested` holds the member of each held-out pair."""
    columns = {
        "members": np.bincount(groups, minlength=n_groups),
        "interactions": np.bincount(groups, counts, n_groups).astype(int),
        "test_pairs": np.bincount(groups[tested], minlength=n_groups),
    }
    return [{name: int(column[g]) for name, column in columns.items()} for g in range(n_groups)]


def group_means(values: np.ndarray, groups: np.ndarray, n_groups: int) -> list[float | None]:
    """Mean of `values` in each group; None where there is none."""
    sums, n = np.bincount(groups, values, n_groups), np.bincount(groups, minlength=n_groups)
    return [float(s / count) if count else None for s, count in zip(sums, n, strict=True)]


def describe_lists(items: np.ndarray, popularity: np.ndarray) -> dict[str, float]:
    """Popularity bias of lists int32 [n, K] (-1 pads) over a catalogue with `popularity` [I]."""
    used = np.bincount(items[items >= 0], minlength=len(popularity))
    head = np.argsort(-popularity, kind="stable")[: max(1, round(HEAD * len(popularity)))]
    return {
        "coverage": float((used > 0).mean()),
        "gini": metrics.gini(used),
        "head_share": float(used[head].sum() / max(used.sum(), 1)),
    }


def describe_negatives(
    pairs: np.ndarray, train: Csr, test: Csr, warm_up: tuple[np.ndarray, np.ndarray] | None, n_threads: int
) -> dict:
    """What (user, negative) pairs int32 [n, 2] were: spread, hardness, and how many are held-out positives.

    chance: the expected share for uniform draws from what the user did not train on, |T_u| / (I - |train_u|). A
    negative's percentile is the share of those items that the warm-up recommender scores below it.
    """
    to_cell = np.array([test.n_cols, 1], np.int64)
    cells = pairs @ to_cell
    false = np.isin(cells, test.pairs() @ to_cell)
    drawn, free = np.bincount(pairs[:, 0], minlength=test.n_rows), test.n_cols - train.degrees()
    used = np.bincount(pairs[:, 1])
    told = {
        "n": len(pairs),
        "distinct_items": int((used > 0).sum()),
        "top_item_share": float(used.max() / len(pairs)),
        "false": metrics.share_interval(np.bincount(pairs[:, 0], false, test.n_rows), drawn.astype(float)),
        "chance": float((drawn * test.degrees() / np.maximum(free, 1)).sum() / len(pairs)),
        "percentile": None,
    }
    if warm_up:
        distinct, repeats = np.unique(cells, return_counts=True)  # in the order of a Csr's pairs
        users, items = np.divmod(distinct, test.n_cols)
        asked = Csr.from_pairs(users, items, test.n_rows, test.n_cols)
        ranks = _core.test_ranks(  # [nnz], none is beyond the last place
            *warm_up, train.indptr, train.indices, asked.indptr, asked.indices, k=test.n_cols, n_threads=n_threads
        )
        below = (free[users] - ranks) / np.maximum(free[users] - 1, 1)
        told["percentile"] = float(np.average(below, weights=repeats))
    return told


def describe_generated(made: dict) -> tuple[dict, np.ndarray]:
    """Counts and similarities of what `view.load_generated` gives, and its (user, matched item) pairs int32 [n, 2]."""
    matched = made["matches"] >= 0  # [N, m]
    scores = made["match_scores"][matched]
    told = {
        "pairs": len(matched),
        "without_match": int((~matched.any(1)).sum()),
        "similarity": np.quantile(scores, np.arange(5) / 4).tolist() if len(scores) else None,
        "status": Counter(reply["status"] for reply in made["replies"] or ()),
    }
    users = np.repeat(made["pairs"][:, 0], matched.sum(1))
    return told, np.stack([users, made["matches"][matched]], axis=1)
