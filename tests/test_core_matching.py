"""Matching generated negatives to the catalogue, by vector and by title."""

import numpy as np
import pytest
from core_cases import MANY, SEEDS, agree_everywhere, csr
from hypothesis import given

from hnlm_ref import _core, reference


def exact_vectors(rng, n):
    """One or four equal parts of +-1 in eight dimensions, times a power of two: lengths and cosines are exact. Some
    rows are zero."""
    signs = rng.choice([-1.0, 1.0], (n, 8))
    places = rng.random((n, 8)).argsort(1)
    kept = places < rng.choice([1, 4], (n, 1))
    return (signs * kept * rng.choice([0, 0.5, 1, 4], (n, 1), p=[0.1, 0.3, 0.3, 0.3])).astype(np.float32)


@MANY
@given(SEEDS)
def test_matches_equal_the_twin_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    n_users, n_items, n = int(rng.integers(1, 5)), int(rng.integers(0, 90)), int(rng.integers(0, 20))
    owned = csr(rng, n_users, n_items, rng.choice([0.0, 0.1, 0.5]))
    queries, items = exact_vectors(rng, n), exact_vectors(rng, n_items)
    queries, items = (v.astype(rng.choice([np.float16, np.float32])) for v in (queries, items))
    users = rng.integers(0, n_users, n).astype(np.int32)
    band = [(-1.0, 1.0), (0.0, 1.0), (-0.25, 0.5), (0.5, 0.25), (1.0, 1.0)][rng.integers(5)]
    agree_everywhere(
        "match_items", reference.match_items, queries, items, users, *owned, int(rng.integers(0, 9)), *band
    )


@MANY
@given(SEEDS)
def test_title_matches_equal_the_twin(seed):
    rng = np.random.default_rng(seed)
    n_items, n = int(rng.integers(0, 12)), int(rng.integers(0, 5))
    owned = csr(rng, 3, n_items, 0.2)
    words = ["Toy", "toy", "STORY", "éa", "2", "-", " ", "", "!", "ab"]
    title = lambda: "".join(rng.choice(words, rng.integers(0, 5)).tolist())  # noqa: E731
    titles, catalogue = [title() for _ in range(n)], [title() for _ in range(n_items)]
    users = rng.integers(0, 3, n).astype(np.int32)
    args = titles, catalogue, users, *owned, int(rng.integers(0, 5)), float(rng.choice([0.0, 0.3, 1.0]))
    for found, expected in zip(_core.match_titles(*args), reference.match_titles(*args), strict=True):
        assert np.array_equal(found, expected)


def test_titles_match_whatever_their_case_and_punctuation():
    """ " toy story 1995 " has 14 trigrams, " toy soldiers " 12; four are common: " to", "toy", "oy ", "y s"."""
    titles, catalogue = ["toy story, 1995", "zzz", ""], ["Toy Story (1995)", "Toy Soldiers", "!!!", "Heat"]
    nobody = np.zeros(3, np.int32), np.zeros(2, np.int64), np.zeros(0, np.int32)
    found, scores = _core.match_titles(titles, catalogue, *nobody, 2, 0.2)
    assert found.tolist() == [[0, 1], [-1, -1], [-1, -1]] and scores[0].tolist() == [1, np.float32(8 / 26)]


def test_cosine_decides_and_ties_go_to_the_smaller_item():
    """Case D09; queries of length, excluded items, all items excluded."""
    items = np.array([[1, 0], [0, 1], [3, 3], [-1, 0], [30, 30]], np.float32)
    queries = np.array([[1, 0.1], [1, 0.1], [0, 0], [2, 2], [1, 0.1]], np.float32)
    indptr, indices = np.array([0, 0, 1, 6], np.int64), np.array([0, 0, 1, 2, 3, 4], np.int32)
    found, cosines = _core.match_items(queries, items, np.array([0, 1, 0, 0, 2], np.int32), indptr, indices, 10)
    assert [row[row >= 0].tolist() for row in found] == [[0, 2, 4, 1, 3], [2, 4, 1, 3], [], [2, 4, 0, 1, 3], []]
    assert np.allclose(cosines[0, :5], [0.995037, 0.773957, 0.773957, 0.099504, -0.995037], atol=1e-6)
    assert cosines.max() <= 1 and np.all(cosines[found == -1] == -np.inf)


def test_a_cosine_that_rounding_puts_below_minus_one_is_a_match_of_minus_one():
    """Of 300 vectors against their opposites 70 products of the rounded directions lie below -1."""
    vectors = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    none = np.zeros(301, np.int64), np.zeros(0, np.int32)
    found, cosines = _core.match_items(-vectors, vectors, np.arange(300, dtype=np.int32), *none, 300)
    assert np.sort(found).tolist() == [list(range(300))] * 300
    assert found[:, -1].tolist() == list(range(300)) and cosines.min() == -1


def test_nan_is_refused_with_its_row():
    """Case D09, query 3."""
    queries = np.array([[1, 2], [np.nan, 1]], np.float32)
    args = np.zeros(2, np.int32), np.zeros(2, np.int64), np.zeros(0, np.int32), 3
    with pytest.raises(ValueError, match="queries: row 1 has 1 non-finite"):
        _core.match_items(queries, np.ones((4, 2), np.float32), *args)
    with pytest.raises(ValueError, match="items: row 0 has 2 non-finite"):
        _core.match_items(np.ones((2, 2), np.float32), np.full((1, 2), np.inf, np.float16), *args)


def test_long_vectors_match_as_float64_says():
    """d = 4096, float16, and a block of items that does not fit at once (more than 16 MB of panels)."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((40, 4096)).astype(np.float16)
    items = rng.standard_normal((1500, 4096)).astype(np.float16)
    none = np.zeros(41, np.int64), np.zeros(0, np.int32)
    found, cosines = _core.match_items(queries, items, np.arange(40, dtype=np.int32), *none, 7)
    wide, others = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries.astype("f8"), items.astype("f8")))
    exact = wide @ others.T
    assert np.abs(cosines - np.take_along_axis(exact, found, 1)).max() < 1e-5
    assert np.abs(cosines - np.sort(exact, 1)[:, ::-1][:, :7]).max() < 1e-5
