"""Full ranking of the catalogue: lists, metrics, and the case where nobody can stop early."""

import copy

import numpy as np
import pytest
from bench_matching import FLOOR, torch_blocks

from hnlm_ref import _core


def lists(data, k, n_threads):
    return lambda: _core.topk(data.user_emb, data.item_emb, *data.train, k, n_threads)


def torch_lists(data, k, n_threads):
    return torch_blocks(data, k, n_threads, cosine=False)


def implicit_lists(data, k, n_threads):
    from implicit.cpu.topk import topk
    from scipy.sparse import csr_matrix

    indptr, indices = data.train
    own = csr_matrix((np.ones(len(indices), np.float32), indices, indptr), (data.n_users, data.n_items))
    return lambda: topk(data.item_emb, data.user_emb, k, filter_query_items=own, num_threads=n_threads)


def metrics(data, k, n_threads):
    def evaluate():
        ranks = _core.test_ranks(data.user_emb, data.item_emb, *data.train, *data.test, k, n_threads)
        return _core.user_metrics(ranks, data.test[0], np.array([k]))[:2, 0]

    return evaluate


def metrics_of_lists(make):
    """Recall and NDCG of other people's lists, in vectors."""

    def build(data, k, n_threads):
        rank = make(data, k, n_threads)
        indptr, indices = data.test
        keys = np.repeat(np.arange(data.n_users), np.diff(indptr)) * data.n_items + indices
        gains = 1 / np.log2(np.arange(k) + 2)
        n_held_out = np.diff(indptr)

        def evaluate():
            found = rank()[0].astype(np.int64) + np.arange(data.n_users)[:, None] * data.n_items
            place = np.searchsorted(keys, found).clip(max=len(keys) - 1)
            hits = keys[place] == found
            ideal = np.concatenate([[np.nan], np.cumsum(gains)])[np.minimum(n_held_out, k)]
            with np.errstate(invalid="ignore"):
                return np.stack([hits.sum(1) / n_held_out, (hits * gains).sum(1) / ideal])

        return evaluate

    return build


def irspack_metrics(data, k, n_threads):
    from irspack.evaluation._core_evaluator import EvaluatorCore
    from scipy.sparse import csr_matrix

    matrices = [
        csr_matrix((np.ones(len(indices)), indices, indptr), (data.n_users, data.n_items))
        for indptr, indices in (data.test, data.train)
    ]
    core = EvaluatorCore(matrices[0], [])

    def evaluate():
        for start in range(0, data.n_users, 512):
            scores = data.user_emb[start : start + 512] @ data.item_emb.T
            scores[matrices[1][start : start + 512].nonzero()] = -np.inf
            core.get_metrics_f32(scores, k, start, n_threads, False)
        return None

    return evaluate


def first_choice(data):
    """The same log with each user's best item held out: no count can stop early."""
    best = _core.topk(data.user_emb, data.item_emb, *data.train, 1)[0][:, 0]
    data = copy.copy(data)
    data.test = np.arange(data.n_users + 1), best
    return data


LISTS = {
    "hnlm-ref": ("hnlm_ref", lists, ""),
    "torch matmul, mask, topk": ("torch", torch_lists, ""),
    "implicit": ("implicit", implicit_lists, "fills short lists with known items"),
    **FLOOR,
}
METRICS = {
    "hnlm-ref": ("hnlm_ref", metrics, ""),
    "torch lists, numpy metrics": ("torch", metrics_of_lists(torch_lists), ""),
    "implicit lists, numpy metrics": ("implicit", metrics_of_lists(implicit_lists), ""),
    "irspack": ("irspack", irspack_metrics, "means only"),
    **FLOOR,
}
SHAPES = [("S", 20, 2), ("S", 100, 2), ("M", 20, 1), ("M", 20, 2), ("M", 100, 2), ("L", 20, 2), ("L", 100, 2)]


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(("size", "k", "n_threads"), SHAPES)
def test_lists(timed, log, size, k, n_threads, name):
    module, make, note = LISTS[name]

    def same_scores(result, size):
        assert result is None or np.allclose(result[1], lists(log(size), k, n_threads)()[1], atol=1e-4)

    timed(f"lists, top {k}", size, n_threads, name, module, lambda s: make(log(s), k, n_threads), same_scores, note)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("size", "k", "n_threads"), SHAPES)
def test_metrics(timed, log, size, k, n_threads, name):
    module, make, note = METRICS[name]

    def same_metrics(result, size):
        if result is None:
            return
        data = log(size)
        close = np.isclose(result, metrics(data, k, n_threads)(), atol=1e-6, equal_nan=True).all(axis=0)
        # Sums in another order part near ties otherwise (M, K = 100, implicit: of one user in 22,338): a user may
        # differ only where a held-out item has one.
        for user in np.flatnonzero(~close):
            scores = np.sort(data.item_emb @ data.user_emb[user])
            held_out = data.item_emb[data.test[1][slice(*data.test[0][user : user + 2])]] @ data.user_emb[user]
            assert (np.searchsorted(scores, held_out + 1e-6) - np.searchsorted(scores, held_out - 1e-6)).max() > 1
        assert close.mean() > 0.9995

    timed(f"metrics at {k}", size, n_threads, name, module, lambda s: make(log(s), k, n_threads), same_metrics, note)


@pytest.mark.parametrize("name", ["hnlm-ref", "torch lists, numpy metrics", "floor"])
@pytest.mark.parametrize("size", ["S", "M", "L"])
def test_first_choices(timed, log, size, name):
    module, make, note = METRICS[name]
    job = "metrics at 20, every held-out item the first choice"
    timed(job, size, 2, name, module, lambda s: make(first_choice(log(s)), 20, 2), None, note)
