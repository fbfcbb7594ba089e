"""Hard negatives before and after the language model: triplets to tune on, pairs to ask about, and what came out."""

import numpy as np

from hnlm_ref import _core
from hnlm_ref.artifacts import Csr, Prep
from hnlm_ref.console import progress


def mine_triplets(
    prep: Prep,
    cf: tuple[np.ndarray, np.ndarray],
    blocked: Csr,
    users: list[int],
    pairs_per_user: int,
    n_positives: int,
    window: tuple[int, int] | None,
    pool_size: int,
    rng: np.random.Generator,
) -> dict[int, np.ndarray]:
    """For each user u up to n items i taken in training, and m hard negatives j of u for each, by the warm-up scores.

    cf       warm-up vectors of users [U, d_cf] and items [I, d_cf]
    blocked  items that j may not be: the training items, and what a guard refuses
    window   j is any of the free items of these warm-up ranks, [from, to), 0 the best; a short list gives what it has;
             None: j is the best-scored of `pool_size` free items drawn with replacement
    Returns  user -> int64 [n, 1 + m], i and its j's; a user without a free item has none
    """
    found = {}
    for u in progress(users, desc="mining", unit="user"):
        free = np.delete(np.arange(prep.n_items), blocked.row(u))
        items = rng.permutation(prep.train.row(u))[:pairs_per_user]
        if not (len(free) and len(items)):
            continue
        scores = np.einsum("id,d->i", cf[1], cf[0][u])[free]  # not by BLAS, whose digits vary with its threads
        if window:
            low, high = min(window[0], len(free) - 1), min(window[1], len(free))
            best = np.flatnonzero(scores >= np.partition(scores, -high)[-high])  # `high` of them, and ties of the last
            ranked = free[best[np.argsort(-scores[best], kind="stable")]]
            chosen = ranked[rng.integers(low, high, (len(items), n_positives))]
        else:
            pool = rng.integers(len(free), size=(len(items), n_positives, pool_size))
            hardest = scores[pool].argmax(axis=2, keepdims=True)
            chosen = free[np.take_along_axis(pool, hardest, 2)[:, :, 0]]
        found[u] = np.concatenate([items[:, None], chosen], axis=1).astype(np.int64)
    return found


def choose_pairs(train: Csr, pairs_per_user: int, seed: int) -> np.ndarray:
    """Training pairs by user and item number, at most n of each user who has not taken every item, int32 [N, 2]."""
    pairs = train.pairs()
    free = train.degrees()[pairs[:, 0]] < train.n_cols
    order = np.random.default_rng(seed).permutation(len(pairs))
    order = order[np.argsort(pairs[order, 0], kind="stable")]  # users in order, their pairs shuffled
    place = np.arange(len(pairs)) - np.repeat(train.indptr[:-1], train.degrees())  # of a pair among its user's
    return pairs[np.sort(order[free[order] & (place < (pairs_per_user or len(pairs)))])]


def with_best_ranked(taken: Csr, cf: tuple[np.ndarray, np.ndarray], n: int, n_threads: int = 0) -> Csr:
    """The items taken and, of those not taken, each user's n best by the warm-up scores."""
    if n == 0:
        return taken
    best = _core.topk(*cf, taken.indptr, taken.indices, n, n_threads)[0]  # [U, n], -1 pads
    users, place = np.nonzero(best >= 0)
    return taken.union(Csr.from_pairs(users, best[users, place], taken.n_rows, taken.n_cols))


QUALITY_USERS = 1000  # Choice: figures are of at most so many users, evenly spread, as their items are all ranked


def quality(
    kinds: dict[str, np.ndarray],
    users: np.ndarray,
    prep: Prep,
    cf: tuple[np.ndarray, np.ndarray],
    text: tuple[np.ndarray, np.ndarray],
) -> dict[str, dict[str, float | None]]:
    """How hard, how false and how varied some kinds of negatives are.

    kinds    name: int32 [N, m], items, -1 for none, of users int32 [N]
    cf       warm-up vectors of users and items, text: text vectors of users and items
    Returns  of each kind, means over all its matches, None without any:

    warm_up_percentile  share of the other items not taken that the warm-up scores lower: 1 is hardest, 0.5 random
    false_rate          share of negatives that are held-out positives of the user (FHNS), on valid: test stays closed
    false_rate_chance   the same for a random item not taken
    false_rate_as_hard  the same for a random item of the same warm-up rank (mean over users, window of 21 ranks)
    profile_similarity  cosine of item text and user text
    popularity          share of the items with fewer training users; 0.5 random
    coverage            share of the catalogue that is used; most_used: share of the most frequent item
    matched             share of the rows of `kinds` that have any match
    """
    n_items = prep.n_items
    some = np.unique(users)  # [S]
    some = some[:: -(-len(some) // QUALITY_USERS)]
    of_some = np.isin(users, some)  # [N]
    taken, held_out = (np.zeros((len(some), n_items), bool) for _ in range(2))
    for mark, part in ((taken, prep.train), (held_out, prep.valid)):
        mark[tuple(part.take(some).pairs().T)] = True
    scores = np.where(taken, -np.inf, np.einsum("sd,id->si", cf[0][some], cf[1]))  # [S, I], not by BLAS as above
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)  # 0 is hardest
    free = n_items - prep.train.degrees()  # [U]
    up_to_rank = np.cumsum(np.bincount(rank[held_out] + 1, minlength=n_items + 1)) / len(some)  # [I + 1]
    low, high = np.maximum(np.arange(n_items) - 10, 0), np.minimum(np.arange(n_items) + 11, n_items)
    as_hard = (up_to_rank[high] - up_to_rank[low]) / (high - low)  # [I], by rank
    texts = text[0][some], text[1]  # [S, d_llm], [I, d_llm]
    user_text, item_text = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in texts)
    popularity = np.bincount(prep.train.indices, minlength=n_items)

    def figures(matches: np.ndarray) -> dict[str, float | None]:
        row, place = np.nonzero((matches >= 0) & of_some[:, None])
        u, j = users[row], matches[row, place]
        r = np.searchsorted(some, u)
        used = np.bincount(j, minlength=n_items)
        blocks = np.split(np.arange(len(j)), range(4096, len(j), 4096))  # of all matches the vectors would be many GB
        values = {
            "warm_up_percentile": (free[u] - 1 - rank[r, j]) / np.maximum(free[u] - 1, 1),
            "false_rate": held_out[r, j],
            "false_rate_chance": prep.valid.degrees()[u] / free[u],
            "false_rate_as_hard": as_hard[rank[r, j]],
            "profile_similarity": np.concatenate([(user_text[r[b]] * item_text[j[b]]).sum(1) for b in blocks]),
            "popularity": np.searchsorted(np.sort(popularity), popularity)[j] / n_items,
            "coverage": (used > 0).mean(),
            "most_used": used.max() / max(len(j), 1),
            "matched": (matches[of_some] >= 0).any(1).mean(),
        }
        return {name: round(float(np.mean(value)), 5) if len(j) else None for name, value in values.items()}

    return {name: figures(matches) for name, matches in kinds.items()}
