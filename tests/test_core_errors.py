"""Every documented error of the core once: its type, and the argument and value in its text."""

import inspect
import sys

import numpy as np
import pytest
from conftest import run_measured

from hnlm_ref import _core

I32, I64, F32 = np.int32, np.int64, np.float32
INDPTR, INDICES = np.array([0, 2, 3], I64), np.array([0, 3, 1], I32)
USERS, EMB, ITEMS = np.array([0, 1], I32), np.ones((2, 4), F32), np.ones((5, 4), F32)


def draw(indptr=INDPTR, indices=INDICES, n_items=5, users=USERS, n=3, seed=1, **more):
    return _core.sample_uniform(indptr, indices, n_items, users, n, seed, **more)


def rank(user_emb=EMB, item_emb=ITEMS, indptr=INDPTR, indices=INDICES, k=2, **more):
    return _core.topk(user_emb, item_emb, indptr, indices, k, **more)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: draw(users=USERS.astype(I64)), TypeError, "argument 'users': expected.*int32.*found.*int64.*"),
        (lambda: draw(users=USERS.astype(np.uint32)), TypeError, "argument 'users': expected.*int32.*found.*uint32.*"),
        (lambda: draw(indptr=INDPTR.astype(I32)), TypeError, "argument 'indptr': expected.*int64.*found.*int32.*"),
        (lambda: draw(users=[0, 1]), TypeError, "argument 'users': expected.*found.*list"),
        (
            lambda: draw(users=USERS[:, None]),
            TypeError,
            "argument 'users': expected.*1-dimensional.*found.*2-dimensional",
        ),
        (lambda: draw(users=np.zeros(6, I32)[::2]), TypeError, "argument 'users': expected.*not C-contiguous"),
        (lambda: rank(user_emb=np.asfortranarray(EMB)), TypeError, "argument 'user_emb': expected.*not C-contiguous"),
        (lambda: rank(user_emb=np.ones((4, 2), F32).T), TypeError, "argument 'user_emb': expected.*not C-contiguous"),
        (
            lambda: rank(user_emb=np.ones((2, 8), F32)[:, ::2]),
            TypeError,
            "argument 'user_emb': expected.*not C-contiguous",
        ),
        (
            lambda: rank(user_emb=EMB.astype(float)),
            TypeError,
            "argument 'user_emb': expected.*float32.*found.*float64",
        ),
        (lambda: draw(out=np.zeros((2, 3), I64)), TypeError, "'out': expected a writable.*int64"),
        (lambda: draw(out=np.zeros((3, 3), I32)), ValueError, r"out has shape \[3, 3\], expected \[2, 3\]"),
        (lambda: draw(seed=-1), ValueError, "seed is -1"),
        (lambda: draw(n=-2), ValueError, "n_negatives is -2"),
        (lambda: draw(n_items=2**40), ValueError, "n_items is 1099511627776"),
        (lambda: draw(n_threads=-1), ValueError, "n_threads is -1"),
        (lambda: draw(n_threads=1025), ValueError, "n_threads is 1025"),
        (lambda: rank(k=-5), ValueError, "k is -5"),
        (lambda: rank(k=2**200), ValueError, "k is 1606938"),
        (lambda: draw(users=np.array([0, 2], I32)), IndexError, r"users\[1\] is 2.*less than 2"),
        (lambda: draw(users=np.array([-1], I32)), IndexError, r"users\[0\] is -1"),
        (lambda: draw(n_items=3), IndexError, r"indices\[1\] is 3.*less than 3"),
        (lambda: draw(indices=np.array([3, 0, 1], I32)), ValueError, "indices: row 0 is not ascending.*item 0"),
        (lambda: draw(indices=np.array([3, 3, 1], I32)), ValueError, "indices: row 0 is not ascending.*item 3"),
        (lambda: draw(indptr=np.array([0, 2, 4], I64)), ValueError, "indptr does not rise"),
        (lambda: draw(indptr=np.array([1, 2, 3], I64)), ValueError, "indptr does not rise.*row 0"),
        (lambda: draw(indptr=np.array([0, 2, 2], I64)), ValueError, "indptr does not rise.*row 2"),
        (lambda: draw(indptr=np.array([0, 5, 3], I64)), ValueError, "indptr does not rise.*row 0"),
        (lambda: draw(indptr=np.array([0, 2, 1, 3], I64)), ValueError, "indptr does not rise.*row 1"),
        (lambda: draw(indptr=np.array([0, -1, 3], I64), users=USERS[1:]), ValueError, "indptr does not rise.*row 1"),
        (lambda: rank(np.ones((3, 4), F32), indptr=np.array([0, 2, 1, 3], I64)), ValueError, "not rise.*row 1"),
        (lambda: rank(indptr=np.array([0, -1, 3], I64)), ValueError, "indptr does not rise.*row 0"),
        (lambda: draw(indptr=np.zeros(0, I64)), ValueError, "indptr has 0 entries"),
        (lambda: rank(indptr=np.array([0, 3], I64)), ValueError, "indptr has 2 entries, expected 3"),
        (lambda: rank(item_emb=np.ones((5, 3), F32)), ValueError, r"item_emb \(dimensions\) has 3 entries, expected 4"),
        (lambda: _core.match_items(EMB, ITEMS, USERS[:1], INDPTR, INDICES, 2), ValueError, "users has 1 entries"),
        (lambda: _core.match_items(EMB, ITEMS, USERS, INDPTR, INDICES, 2, np.nan), ValueError, "min_similarity is NaN"),
        (lambda: _core.match_items(EMB.astype(float), ITEMS, USERS, INDPTR, INDICES, 2), TypeError, "float16"),
        (lambda: _core.match_titles(["a"], ["b"], USERS, INDPTR, INDICES, 2, 0.5), ValueError, "users has 2 entries"),
        (
            lambda: _core.match_items(EMB, ITEMS[:, :3].copy(), USERS, INDPTR, INDICES, 2),
            ValueError,
            "has 3 .*expected 4",
        ),
        (lambda: _core.topk_scores(np.ones((3, 5), F32), INDPTR, INDICES, 2), ValueError, "indptr has 3 .*expected 4"),
        (lambda: _core.ranks_in_lists(np.ones((3, 2), I32), INDPTR, INDICES), ValueError, "test_indptr has 3 .*ted 4"),
        (
            lambda: _core.test_ranks(EMB, ITEMS, INDPTR, INDICES, np.zeros(2, I64), INDICES[:0], 2),
            ValueError,
            "test_indptr has 2 entries, expected 3",
        ),
        (
            lambda: _core.filter_candidates(INDPTR, INDICES, USERS, np.zeros((3, 2), I32)),
            ValueError,
            "users has 2 entries, expected 3",
        ),
        (lambda: _core.match_items(EMB, ITEMS, USERS + I32(1), INDPTR, INDICES, 2), IndexError, r"users\[1\] is 2"),
        (lambda: _core.match_titles(["a"] * 2, ["b"] * 5, USERS + I32(1), INDPTR, INDICES, 2, 0), IndexError, "users"),
        (
            lambda: _core.test_ranks(EMB, ITEMS, INDPTR, INDICES, INDPTR, INDICES + I32(3), 2),
            IndexError,
            "test_indices",
        ),
        (lambda: _core.user_metrics(INDICES, INDPTR, np.array([0])), ValueError, "ks is 0"),
        (lambda: _core.user_metrics(-INDICES, INDPTR, np.array([1])), IndexError, r"ranks\[1\] is -3"),
        (
            lambda: _core.sample_popularity(INDPTR, INDICES, np.array([1.0, -1]), USERS, 1, 1),
            ValueError,
            "weights is -1",
        ),
        (lambda: _core.filter_candidates(INDPTR, INDICES, USERS, np.full((2, 2), -2, I32)), IndexError, "candidates"),
        (lambda: _core.use_kernel("abacus"), ValueError, "name is abacus"),
    ],
)
def test_wrong_input_is_refused_by_name_and_value(call, error, words):
    with pytest.raises(error, match=words):
        call()


GOOD = {
    "indptr": INDPTR, "indices": INDICES, "test_indptr": INDPTR, "test_indices": INDICES, "ranks": INDICES,
    "users": USERS, "candidates": np.ones((2, 2), I32), "weights": np.ones(5), "n_items": 5,
    "n_negatives": 3, "seed": 1, "queries": EMB, "items": ITEMS, "user_emb": EMB, "item_emb": ITEMS,
    "scores": np.ones((2, 5), F32), "titles": ["a", "b"], "catalogue": ["a"] * 5, "k": 2,
    "min_similarity": 0.0, "max_similarity": 1.0, "name": "plain",
    "topk": np.ones((2, 2), I32), "ks": np.array([1, 2], I64), "n_threads": 1,
    "out": np.zeros((2, 3), I32),
}  # fmt: skip
ARGUMENTS = [
    (name, argument)
    for name, function in vars(_core).items()
    if callable(function) and not name.startswith("_")
    for argument in inspect.signature(function).parameters
]


def wrong_values(good):
    """What is like a good value but of another type, rank or order."""
    if not isinstance(good, np.ndarray):
        return [object(), [3], INDPTR]
    wide = np.repeat(good, 2, axis=-1)
    misaligned = np.zeros(good.nbytes + 1, np.uint8)[1:].view(good.dtype).reshape(good.shape)
    wrong = [misaligned, good.tolist(), good.astype(np.uint64), good.astype(">i4"), good[None], wide[..., ::2]]
    return [*wrong, good[:, :1].repeat(4, 1).T] if good.ndim == 2 else wrong


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_every_argument_of_the_wrong_kind_is_named(name, argument):
    """Case R01: in the text itself, not only in a note."""
    function = getattr(_core, name)
    good = {other: GOOD[other] for other in inspect.signature(function).parameters}
    for value in wrong_values(GOOD[argument]):
        with pytest.raises(TypeError, match=f"^argument '{argument}': expected .*, found "):
            function(**good | {argument: value})


def test_an_out_that_is_also_an_input_is_refused():
    with pytest.raises(TypeError, match=r"'out': expected .* that no other argument shares"):
        draw(n=1, out=USERS.reshape(2, 1))
    read_only = np.zeros((2, 3), I32)
    read_only.flags.writeable = False
    with pytest.raises(TypeError, match="'out': expected a writable"):
        draw(out=read_only)


@pytest.mark.parametrize("n", [2**45, 2**63 - 1])
def test_a_result_beyond_memory_is_an_error_and_not_the_end_of_the_process(n):
    for call in (lambda: draw(n=n), lambda: rank(k=n)):
        with pytest.raises(MemoryError, match=f"no memory for a result of 2 x {n} numbers"):
            call()
    if n > 2**60:  # for nobody either
        with pytest.raises(MemoryError, match=f"no memory for a result of 0 x {n} numbers"):
            draw(users=USERS[:0], n=n)


def test_metrics_beyond_memory_are_an_error():
    frame, ks = np.zeros(10**6 + 1, I64), np.ones(10**6, I64)
    with pytest.raises(MemoryError, match="no memory for a result of 1000000 x 6000000 numbers"):
        _core.user_metrics(INDICES[:0], frame, ks)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory a process holds is read from /proc")
def test_lists_have_to_fit_into_memory_together_with_their_scores():
    """A GB of items and as much of scores, in a process that may have 1.5 more than it has."""
    run_measured("""
import resource
import numpy as np
import pytest
from hnlm_ref import _core
rank = lambda k: _core.topk(np.ones((1, 4), "f4"), np.ones((5, 4), "f4"), np.zeros(2, "i8"), np.zeros(0, "i4"), k, 1)
rank(2)
held = resource.getpagesize() * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 2**29, -1))
with pytest.raises(MemoryError, match="1 x 268435456"):
    rank(2**28)
""")


def test_empty_input_gives_empty_output():
    """Case R03."""
    nothing = np.zeros(1, I64), np.zeros(0, I32)
    assert _core.sample_uniform(*nothing, 0, np.zeros(0, I32), 3, 1).shape == (0, 3)
    assert draw(n=0).shape == (2, 0) and draw(n=0).dtype == I32  # case B17
    assert _core.topk(EMB[:0], ITEMS, *nothing, 3)[0].shape == (0, 3)
    assert _core.topk(EMB, ITEMS[:0], np.zeros(3, I64), nothing[1], 3)[0].tolist() == [[-1] * 3] * 2
    assert _core.match_items(EMB[:0], ITEMS, nothing[1], *nothing, 3)[0].shape == (0, 3)
    assert _core.match_titles([], [], nothing[1], *nothing, 3, 0.5)[0].shape == (0, 3)
    assert _core.user_metrics(nothing[1], nothing[0], np.array([5])).shape == (6, 1, 0)


@pytest.mark.parametrize("d", [2**45, 2**60])
def test_no_vectors_may_be_of_any_length(d):
    none, nothing = np.zeros((0, d), F32), (np.zeros(1, I64), np.zeros(0, I32))
    assert rank(none, none, *nothing)[0].shape == (0, 2)
    assert _core.test_ranks(none, none, *nothing, *nothing, 2).shape == (0,)
    assert _core.match_items(none, none.astype(np.float16), nothing[1], *nothing, 2)[0].shape == (0, 2)


def test_views_with_odd_strides_equal_their_contiguous_copies():
    """Case R02: a column or an empty slice that NumPy calls contiguous is taken, anything else refused above."""
    wide = np.arange(40, dtype=F32).reshape(10, 4)
    assert np.array_equal(rank(user_emb=wide[2:4])[0], rank(user_emb=wide[2:4].copy())[0])
    read_only = EMB.copy()
    read_only.flags.writeable = False
    assert np.array_equal(rank(user_emb=read_only)[0], rank()[0])
