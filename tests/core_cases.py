"""Random inputs for the tests of the Rust core, and the one way they compare it with its twin."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hnlm_ref import _core

MANY = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**32 - 1)


def csr(rng, n_rows, n_cols, share, odd=True):
    """Rows that hold about `share` of the columns; if `odd`, now and then an empty and a full one."""
    owned = rng.random((n_rows, n_cols)) < share
    if odd and n_rows > 1 and rng.random() < 0.2:
        owned[0], owned[1] = False, True
    indptr = np.concatenate([[0], owned.sum(1).cumsum()]).astype(np.int64)
    return indptr, np.nonzero(owned)[1].astype(np.int32)


def outcome(call, *args):
    """What a call returns, as a tuple of arrays, or the text of its ValueError."""
    try:
        result = call(*args)
    except ValueError as error:
        return str(error)
    return result if isinstance(result, tuple) else (result,)


def same(found, expected):
    if isinstance(expected, str):
        return found == expected
    return all(f.dtype == e.dtype and np.array_equal(f, e) for f, e in zip(found, expected, strict=True))


def agree_everywhere(name, twin, *args, threads=(1, 3)):
    """`_core.NAME` equals its twin bit for bit with every kernel of this processor and every number of threads."""
    expected = outcome(twin, *args)
    try:
        for kernel in _core.kernels():
            _core.use_kernel(kernel)
            for n_threads in threads:
                call = getattr(_core, name)
                found = outcome(lambda n=n_threads, call=call: call(*args, n_threads=n))
                assert same(found, expected), (kernel, n_threads, found, expected)
    finally:
        _core.use_kernel(_core.kernels()[0])
    return expected
