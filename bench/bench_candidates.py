"""Negative sampling against the loops people write and the libraries they use: every training pair gets m draws."""

import types

import numpy as np
import pytest

from hnlm_ref import _core


def ours(data, m, n_threads, beta=None):
    out = np.zeros((len(data.users), m), np.int32)  # the caller's buffer: fresh pages cost as much as the draws
    if beta is None:
        return lambda: _core.sample_uniform(*data.train, data.n_items, data.users, m, 1, n_threads, out)
    weights = data.degrees.astype(float) ** beta
    return lambda: _core.sample_popularity(*data.train, weights, data.users, m, 1, n_threads, out)


def numba_loop(data, m, n_threads, beta=None):
    """Rejection with a binary search of the user's row, rows in parallel."""
    import numba

    sums = np.cumsum(data.degrees.astype(float) ** (beta or 0))

    # Unseeded: every numba thread has a generator of its own, and only whether a draw is owned is checked.
    @numba.njit(parallel=True, cache=False)
    def draw(indptr, indices, n_items, users, out, sums, by_weight):
        for r in numba.prange(len(users)):
            start, stop = indptr[users[r]], indptr[users[r] + 1]
            owned = indices[start:stop]
            for j in range(out.shape[1]):
                while True:
                    if by_weight:
                        item = np.searchsorted(sums, np.random.random() * sums[-1], side="right")
                    else:
                        item = np.random.randint(0, n_items)
                    place = np.searchsorted(owned, item)
                    if place == len(owned) or owned[place] != item:
                        break
                out[r, j] = item
        return out

    out = np.zeros((len(data.users), m), np.int32)
    return lambda: draw(*data.train, data.n_items, data.users, out, sums, beta is not None)


def numpy_rounds(data, m, n_threads, beta=None):
    """Draw all, redraw those found among the sorted pairs, until none is left."""
    rng = np.random.default_rng(1)
    pairs = data.users.astype(np.int64) * data.n_items + data.train[1]
    sums = None if beta is None else np.cumsum(data.degrees.astype(float) ** beta)

    def items(n):
        if sums is None:
            return rng.integers(0, data.n_items, n)
        return np.searchsorted(sums, rng.random(n) * sums[-1], side="right")

    def draw():
        base = np.repeat(data.users.astype(np.int64) * data.n_items, m)
        out, bad = np.empty(len(base), np.int64), np.arange(len(base))
        while len(bad):
            out[bad] = items(len(bad))
            keys = base[bad] + out[bad]
            place = np.searchsorted(pairs, keys).clip(max=len(pairs) - 1)
            bad = bad[pairs[place] == keys]
        return out.reshape(-1, m)

    return draw


def lenskit(data, m, n_threads, beta=None):
    import pandas as pd
    from lenskit.data import from_interactions_df

    frame = pd.DataFrame({"user_id": data.users, "item_id": data.train[1]})
    matrix = from_interactions_df(frame).interactions().matrix()
    rows = np.searchsorted(np.unique(data.users), data.users).astype(np.int32)
    weighting = "uniform" if beta is None else "popularity"
    return lambda: matrix.sample_negatives(rows, weighting=weighting, n=m, rng=1)


def recbole(data, m, n_threads, beta=None):
    import torch
    from recbole.sampler import Sampler

    pairs = {"user": torch.from_numpy(data.users + 1), "item": torch.from_numpy(data.train[1] + 1)}
    pretended = types.SimpleNamespace(
        uid_field="user", iid_field="item", user_num=data.n_users + 1, item_num=data.n_items + 1, inter_feat=pairs
    )
    sampler = Sampler("train", pretended, "uniform" if beta is None else "popularity", beta or 1.0).set_phase("train")
    return lambda: sampler.sample_by_user_ids(data.users + 1, data.train[1] + 1, m)


def written(data, m, n_threads, beta=None):
    out = np.zeros((len(data.users), m), np.int32)
    return lambda: out.fill(1)


IMPLEMENTATIONS = {
    "hnlm-ref": ("hnlm_ref", ours, ""),
    "numba loop": ("numba", numba_loop, ""),
    "numpy rounds": ("numpy", numpy_rounds, "1 thread"),
    "LensKit": ("lenskit", lenskit, "1 thread; gives up after 10 tries"),
    "RecBole": ("recbole", recbole, "1 thread"),
    "floor": ("numpy", written, "1 thread; the numbers written, none drawn"),
}
SLOW = {("L", "RecBole"), ("L", "numpy rounds"), ("S", "RecBole"), ("S", "numpy rounds")}  # many seconds a round
UNIFORM = "uniform negatives, {m} for each training pair"
POPULARITY = "popularity negatives, exponent {beta}, 1 for each training pair"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(
    ("job", "size", "m", "beta"),
    [(UNIFORM, s, m, None) for s, m in (("S", 16), ("M", 1), ("M", 16), ("L", 1), ("L", 16))]
    + [(POPULARITY, s, 1, beta) for s, beta in (("S", 1.0), ("M", 0.75), ("L", 1.0))],
)
def test_draws(timed, log, job, size, m, beta, n_threads, name):
    module, make, note = IMPLEMENTATIONS[name]
    if (size, name) in SLOW or (n_threads == 2 and "1 thread" in note) or (name == "LensKit" and beta == 0.75):
        pytest.skip("slow, timed with 1 thread, or another exponent")

    def no_positives(draws, size):
        data = log(size)
        first = data.users.astype(np.int64) * data.n_items  # cell of a user's first item
        assert note or not np.isin((first[:, None] + draws).ravel(), first + data.train[1]).any()

    job = job.format(m=m, beta=beta)
    timed(job, size, n_threads, name, module, lambda s: make(log(s), m, n_threads, beta), no_positives, note)
