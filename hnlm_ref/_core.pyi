"""Types of the Rust extension, in the order of rust/py.rs; `help(_core.topk)` prints the contract."""

import numpy as np
from numpy.typing import NDArray

_I32 = NDArray[np.int32]
_I64 = NDArray[np.int64]
_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]
_Vectors = NDArray[np.float32] | NDArray[np.float16]

def sample_uniform(
    indptr: _I64,
    indices: _I32,
    n_items: int,
    users: _I32,
    n_negatives: int,
    seed: int,
    n_threads: int = 0,
    out: _I32 | None = None,
) -> _I32: ...
def sample_popularity(
    indptr: _I64,
    indices: _I32,
    weights: _F64,
    users: _I32,
    n_negatives: int,
    seed: int,
    n_threads: int = 0,
    out: _I32 | None = None,
) -> _I32: ...
def filter_candidates(indptr: _I64, indices: _I32, users: _I32, candidates: _I32) -> tuple[_I32, _I32]: ...
def match_items(
    queries: _Vectors,
    items: _Vectors,
    users: _I32,
    indptr: _I64,
    indices: _I32,
    k: int,
    min_similarity: float = -1.0,
    max_similarity: float = 1.0,
    n_threads: int = 0,
) -> tuple[_I32, _F32]: ...
def match_titles(
    titles: list[str],
    catalogue: list[str],
    users: _I32,
    indptr: _I64,
    indices: _I32,
    k: int,
    min_similarity: float,
) -> tuple[_I32, _F32]: ...
def topk(
    user_emb: _F32,
    item_emb: _F32,
    indptr: _I64,
    indices: _I32,
    k: int,
    n_threads: int = 0,
) -> tuple[_I32, _F32]: ...
def topk_scores(scores: _F32, indptr: _I64, indices: _I32, k: int, n_threads: int = 0) -> tuple[_I32, _F32]: ...
def test_ranks(
    user_emb: _F32,
    item_emb: _F32,
    indptr: _I64,
    indices: _I32,
    test_indptr: _I64,
    test_indices: _I32,
    k: int,
    n_threads: int = 0,
) -> _I32: ...
def ranks_in_lists(topk: _I32, test_indptr: _I64, test_indices: _I32) -> _I32: ...
def user_metrics(ranks: _I32, test_indptr: _I64, ks: _I64) -> _F64: ...
def kernels() -> list[str]: ...
def use_kernel(name: str) -> None: ...
def is_debug_build() -> bool: ...
