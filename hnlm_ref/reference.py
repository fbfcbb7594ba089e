"""Plain-Python twin of every `_core` function: slow, short, and the definition of correct.

Same names, same order and same arguments as the extension (without `n_threads` and `out`, which change no result);
`help(_core.topk)` has the contracts. Random draws are equal word for word. Scores are sums in float64 rounded to
float32, so they equal the extension's bit for bit wherever the sums are exact, as for small whole numbers.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

NOTHING = np.float32(-np.inf)
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROW = 0x94D049BB133111EB


def _mix(z: int) -> int:
    """Output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _words(seed: int, row: int, draw: int) -> Iterator[int]:
    """The words tried one after the other for draw `draw` of output row `row`."""
    state = _mix((seed + _GOLDEN) & _MASK) + row * _ROW
    for attempt in itertools.count():
        yield _mix((state + (draw + 1 + (attempt << 32)) * _GOLDEN) & _MASK)


def _below(word: int, bound: int) -> int | None:
    """The upper half of `word` as a uniform number below `bound` (Lemire 2019), None for a surplus word."""
    product = (word >> 32) * bound
    return product >> 32 if product % 2**32 >= 2**32 % bound else None


def _draw(users, n_negatives: int, seed: int, chooser: Callable) -> np.ndarray:
    """First accepted word of every (row, draw); `chooser(user)` returns word -> item or None."""
    out = np.zeros((len(users), n_negatives), np.int32)
    for r, user in enumerate(users if n_negatives else []):
        choose = chooser(int(user))
        for j in range(n_negatives):
            out[r, j] = next(item for item in map(choose, _words(seed, r, j)) if item is not None)
    return out


def _row(indptr, indices, user: int) -> list[int]:
    return indices[indptr[user] : indptr[user + 1]].tolist()


def _no_free_item(user: int, n_seen: int, n_items: int) -> ValueError:
    return ValueError(f"user {user} has no free item to draw ({n_seen} of {n_items} items seen)")


def sample_uniform(indptr, indices, n_items, users, n_negatives, seed):
    """Uniform draws from the complement: by rejection, or by rank for users who own more than a quarter."""

    def chooser(user):
        owned = _row(indptr, indices, user)
        free = sorted(set(range(n_items)) - set(owned))
        if not free:
            raise _no_free_item(user, n_items, n_items)
        if 4 * len(owned) > n_items:
            return lambda word: None if (rank := _below(word, len(free))) is None else free[rank]
        return lambda word: item if (item := _below(word, n_items)) not in owned else None

    return _draw(users, n_negatives, seed, chooser)


def _alias_table(weights) -> tuple[list[tuple[int, int, int]], float]:
    """Columns (keep of 2^32, own item, other item) and the sum of the weights (Walker 1977, Vose 1991)."""
    items = [i for i, w in enumerate(weights) if w > 0]
    total = sum(weights[i] for i in items)
    share = [weights[i] * (len(items) / total) for i in items]
    columns = [(2**32 - 1, i, i) for i in items]
    small = [c for c, s in enumerate(share) if s < 1]
    large = [c for c, s in enumerate(share) if s >= 1]
    while small and large:
        taker, giver = small.pop(), large[-1]
        columns[taker] = (int(share[taker] * 2**32), items[taker], items[giver])
        share[giver] -= 1 - share[taker]
        if share[giver] < 1:
            small.append(large.pop())
    return columns, total


def sample_popularity(indptr, indices, weights, users, n_negatives, seed):
    """Draws by weight from the complement: by rejection, or by cumulative weight where a user owns most of it."""
    weights = weights.tolist()
    columns, total = _alias_table(weights)

    def chooser(user):
        owned = _row(indptr, indices, user)

        def by_table(word):
            column = _below(word, len(columns))
            if column is None:
                return None
            keep, own, other = columns[column]
            item = own if word % 2**32 < keep else other
            return item if item not in owned else None

        def by_mass(word):
            point = (word >> 11) / 2**53 * cumulative[-1]
            return free[min(int(np.searchsorted(cumulative, point, side="right")), len(free) - 1)]

        if sum(weights[i] for i in owned) < 0.75 * total:
            return by_table
        free = [i for i, w in enumerate(weights) if w > 0 and i not in owned]
        if not free:
            raise _no_free_item(user, len(owned), len(weights))
        cumulative = np.cumsum([weights[i] for i in free])
        return by_mass

    return _draw(users, n_negatives, seed, chooser)


def filter_candidates(indptr, indices, users, candidates):
    """Each row without -1 and without the user's own items, packed to the left."""
    out = np.full_like(candidates, -1)
    kept = np.zeros(len(users), np.int32)
    for r, user in enumerate(users):
        owned = _row(indptr, indices, user)
        left = [c for c in candidates[r].tolist() if c >= 0 and c not in owned]
        out[r, : len(left)] = left
        kept[r] = len(left)
    return out, kept


def _lists(rows, users, indptr, indices, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of every row of scores: score descending, then item ascending, padded with -1 and -inf.

    What has -inf, and what the row's user owns, is in no list.
    """
    items = np.full((len(rows), k), -1, np.int32)
    scores = np.full((len(rows), k), NOTHING, np.float32)
    for r, (row, user) in enumerate(zip(rows, users, strict=True)):
        owned = _row(indptr, indices, user)
        free = [i for i in range(len(row)) if i not in owned and row[i] > NOTHING]
        best = sorted(free, key=lambda i: (-row[i], i))[:k]
        items[r, : len(best)] = best
        scores[r, : len(best)] = row[best]
    return items, scores


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float64, rounded to float32; zero rows stay zero."""
    wide = vectors.astype(np.float64)
    norms = np.sqrt((wide**2).sum(1, keepdims=True))
    return (wide / np.where(norms > 0, norms, 1)).astype(np.float32)


def match_items(queries, items, users, indptr, indices, k, min_similarity=-1.0, max_similarity=1.0):
    """Nearest items by clipped cosine inside the band; zero vectors match nothing."""
    for name, table in (("queries", queries), ("items", items)):
        for row, vector in enumerate(table):
            if n_bad := int((~np.isfinite(vector)).sum()):
                raise ValueError(f"{name}: row {row} has {n_bad} non-finite number{'s' * (n_bad > 1)}")
    q, v = _unit(queries), _unit(items)
    cosines = np.clip(_products(q, v), -1, 1)
    outside = (cosines < np.float32(min_similarity)) | (cosines > np.float32(max_similarity))
    cosines[outside | ~q.any(1)[:, None] | ~v.any(1)[None, :]] = NOTHING
    return _lists(cosines, users, indptr, indices, k)


def _trigrams(title: str) -> set[str]:
    words = "".join(c if c.isalnum() else " " for c in title.lower()).split()
    text = f" {' '.join(words)} " if words else ""
    return {text[i : i + 3] for i in range(len(text) - 2)}


def match_titles(titles, catalogue, users, indptr, indices, k, min_similarity):
    """Titles by the Dice coefficient of their trigram sets."""
    rows = []
    for title in map(_trigrams, titles):
        row = np.full(len(catalogue), NOTHING, np.float32)
        for item, other in enumerate(map(_trigrams, catalogue)):
            if title & other:
                dice = np.float32(2 * len(title & other)) / np.float32(len(title) + len(other))
                row[item] = dice if dice >= np.float32(min_similarity) else NOTHING
        rows.append(row)
    return _lists(rows, users, indptr, indices, k)


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.T).astype(np.float32)


def topk(user_emb, item_emb, indptr, indices, k):
    """The first k items of every user by inner product."""
    return topk_scores(_products(user_emb, item_emb), indptr, indices, k)


def topk_scores(scores, indptr, indices, k):
    """The first k items of every user by given score."""
    for user, row in enumerate(scores):
        if n_bad := int(np.isnan(row).sum()):
            raise ValueError(f"scores: user {user} has {n_bad} non-finite score{'s' * (n_bad > 1)}")
    return _lists(scores, range(len(scores)), indptr, indices, k)


def test_ranks(user_emb, item_emb, indptr, indices, test_indptr, test_indices, k):
    """Place of every held-out item in its user's ranking, 0 beyond k."""
    return ranks_in_lists(topk(user_emb, item_emb, indptr, indices, k)[0], test_indptr, test_indices)


def ranks_in_lists(topk, test_indptr, test_indices):
    """Place of every held-out item in its user's list, 0 where it is missing."""
    ranks = np.zeros(len(test_indices), np.int32)
    for user, found in enumerate(topk.tolist()):
        for slot in range(test_indptr[user], test_indptr[user + 1]):
            item = int(test_indices[slot])
            ranks[slot] = found.index(item) + 1 if item in found else 0
    return ranks


def user_metrics(ranks, test_indptr, ks):
    """recall, NDCG, precision, hit, MRR and MAP at every k from the ranks of the held-out items."""
    out = np.full((6, len(ks), len(test_indptr) - 1), np.nan)
    for user in range(len(test_indptr) - 1):
        own = ranks[test_indptr[user] : test_indptr[user + 1]].tolist()
        if not own:
            continue
        for j, k in enumerate(ks.tolist()):
            hits = sorted(rank for rank in own if 0 < rank <= k)
            ideal = min(k, len(own))
            out[:, j, user] = (
                len(hits) / len(own),
                sum(1 / math.log2(rank + 1) for rank in hits) / sum(1 / math.log2(r + 1) for r in range(1, ideal + 1)),
                len(hits) / k,
                float(bool(hits)),
                1 / hits[0] if hits else 0.0,
                sum(n / rank for n, rank in enumerate(hits, 1)) / ideal,
            )
    return out


def is_debug_build() -> bool:
    return False
