"""Nearest catalogue items of a generated vector for every user, the user's own items left out."""

import numpy as np
import pytest

from hnlm_ref import _core


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ours(data, k, n_threads):
    users = np.arange(data.n_users, dtype=np.int32)
    return lambda: _core.match_items(data.user_emb, data.item_emb, users, *data.train, k, -1.0, 1.0, n_threads)


def torch_blocks(data, k, n_threads, cosine=True, block=1024):
    """Matrix product, mask and topk in blocks of users: the exact one-liner everybody writes."""
    import torch

    indptr, indices = data.train
    users, items = (torch.from_numpy(v) for v in (data.user_emb, data.item_emb))

    def match():
        q, v = (torch.nn.functional.normalize(part) if cosine else part for part in (users, items))
        found, scores = [], []
        for start in range(0, len(q), block):
            stop = min(start + block, len(q))
            product = q[start:stop] @ v.T
            rows = np.repeat(np.arange(stop - start), np.diff(indptr[start : stop + 1]))
            own = torch.from_numpy(indices[indptr[start] : indptr[stop]].astype(np.int64))
            product[torch.from_numpy(rows), own] = -torch.inf
            best = product.topk(k)
            found.append(best.indices)
            scores.append(best.values)
        return torch.cat(found).numpy(), torch.cat(scores).numpy()

    return match


def faiss_flat(data, k, n_threads):
    import faiss

    def match():
        index = faiss.IndexFlatIP(data.item_emb.shape[1])
        index.add(unit(data.item_emb))
        scores, found = index.search(unit(data.user_emb), k)
        return found, scores

    return match


def faiss_filtered(data, k, n_threads):
    """Fetch k plus the longest row, drop the user's own: exact, as faiss has no exclusion for each query."""
    indptr, indices = data.train
    search = faiss_flat(data, min(data.n_items, k + int(np.diff(indptr).max())), n_threads)
    own = np.repeat(np.arange(data.n_users), np.diff(indptr)) * data.n_items + indices

    def match():
        found, scores = search()
        known = np.isin(found + np.arange(data.n_users)[:, None] * data.n_items, own)
        order = np.argsort(known, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)

    return match


def squares(data, k, n_threads, n=1024):
    """As many multiply-adds in products of squares, which every library does from the cache at its best."""
    import torch

    a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
    n_products = max(1, round(data.n_users * data.n_items * data.user_emb.shape[1] / n**3))

    def multiply():
        for _ in range(n_products):
            torch.mm(a, b, out=out)

    return multiply


FLOOR = {"floor": ("torch", squares, "the multiply-adds alone, as torch's products of 1,024 x 1,024")}
IMPLEMENTATIONS = {
    "hnlm-ref": ("hnlm_ref", ours, ""),
    "torch matmul, mask, topk": ("torch", torch_blocks, ""),
    "faiss, over-fetch and filter": ("faiss", faiss_filtered, ""),
    "faiss": ("faiss", faiss_flat, "does not exclude: another answer"),
    **FLOOR,
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("size", "d", "k", "n_threads"),
    [("S", 64, 20, 2), ("M", 64, 20, 1), ("M", 64, 20, 2), ("M", 64, 100, 2), ("L", 64, 20, 2), ("M", 576, 20, 2)],
)
def test_matching(timed, log, size, d, k, n_threads, name):
    module, make, note = IMPLEMENTATIONS[name]

    def same_scores(result, size):
        data = log(size, d)
        expected = ours(data, k, n_threads)()[1]
        assert note or np.allclose(result[1], expected, atol=1e-5)

    if size == "L" and name.startswith("faiss, over"):
        pytest.skip("minutes a round")
    job = f"matching, d = {d}, top {k}"
    timed(job, size, n_threads, name, module, lambda size: make(log(size, d), k, n_threads), same_scores, note)
