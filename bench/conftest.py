"""Logs of three sizes, one clock for all, and the tables of bench/RESULTS.md.

    pip install '.[bench]'; pip install --no-deps recbole==1.2.1
    pytest bench/bench_candidates.py bench/bench_matching.py bench/bench_topk.py --benchmark-only

Timed runs print one table per job and put them into RESULTS.md. With --benchmark-disable every bench runs once on a
tiny log, which only checks that all implementations agree. Peers that are not installed are shown as missing.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hnlm_ref import _core
from hnlm_ref.artifacts import Csr

RESULTS = Path(__file__).with_name("RESULTS.md")
SIZES = {  # users, items, training pairs, held-out pairs
    "tiny": (60, 200, 900, 200),
    "S": (6_000, 3_700, 800_000, 200_000),
    "M": (22_338, 9_023, 160_000, 40_000),
    "L": (100_000, 50_000, 1_600_000, 400_000),
}
PEERS = ("numpy", "torch", "numba", "faiss-cpu", "implicit", "irspack", "lenskit", "recbole")
rows: dict[str, list] = defaultdict(list)  # job -> (size, threads, implementation, seconds, note)


def make_log(size: str, d: int = 64) -> SimpleNamespace:
    """Users and items drawn with a long tail, held-out pairs, and vectors whose first dimension is popularity."""
    n_users, n_items, n_train, n_test = SIZES[size]
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, n_items + 1) ** 0.8
    item = rng.permutation(n_items)[rng.choice(n_items, 2 * (n_train + n_test), p=weight / weight.sum())]
    keys = np.unique(rng.integers(0, n_users, len(item)) * n_items + item)
    keys = rng.choice(keys, min(len(keys), n_train + n_test), replace=False)

    def csr(part):
        made = Csr.from_pairs(part // n_items, part % n_items, n_users, n_items)
        return made.indptr, made.indices

    train, test = csr(keys[n_test:]), csr(keys[:n_test])
    user_emb, item_emb = (rng.normal(0, 0.1, (n, d)).astype(np.float32) for n in (n_users, n_items))
    degrees = np.bincount(train[1], minlength=n_items)
    user_emb[:, 0], item_emb[:, 0] = 1, 0.1 * np.log1p(degrees)
    users = np.repeat(np.arange(n_users, dtype=np.int32), np.diff(train[0]))  # the training pairs in order
    return SimpleNamespace(
        n_users=n_users, n_items=n_items, train=train, test=test, user_emb=user_emb, item_emb=item_emb,
        degrees=degrees, users=users,
    )  # fmt: skip


@pytest.fixture(scope="session")
def log():
    return functools.lru_cache(maxsize=1)(make_log)


@pytest.fixture
def timed(benchmark, request):
    """`timed(job, size, n_threads, name, module, make, check)`: median seconds of `make()`'s result over 7 rounds."""
    is_off = request.config.getoption("benchmark_disable")
    if _core.is_debug_build() and not is_off:
        pytest.exit("the extension is a debug build: maturin develop --release", returncode=2)

    def run(job, size, n_threads, name, module, make, check=None, note=""):
        if is_off and size != "S":
            pytest.skip("sizes differ only in time")
        if not is_off:
            rows[job].append([size, n_threads, name, None, f"{module} is not installed"])
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
        fix_threads(n_threads)
        call = make("tiny" if is_off else size)
        result = benchmark.pedantic(call, rounds=7, warmup_rounds=1)
        if check is not None:
            check(result, "tiny" if is_off else size)
        if not is_off:
            rows[job][-1][3:] = [benchmark.stats.stats.median, note]

    return run


def fix_threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)
    others = (("threadpoolctl", "threadpool_limits"), ("numba", "set_num_threads"), ("faiss", "omp_set_num_threads"))
    for module, function in others:
        if importlib.util.find_spec(module):
            getattr(importlib.import_module(module), function)(n)


def table(job: str) -> str:
    """One job's measurements; the ratio is to ours at the same size and number of threads."""
    lines = [
        f"### {job}",
        "",
        "| size | threads | implementation | seconds | ratio to ours | |",
        "|---|---|---|---|---|---|",
    ]
    ours = {(size, n): seconds for size, n, name, seconds, _ in rows[job] if name == "hnlm-ref"}
    for size, n, name, seconds, note in rows[job]:
        base = ours.get((size, n))
        ratio = f"{seconds / base:.2f}" if seconds and base else ""
        lines.append(f"| {size} | {n} | {name} | {f'{seconds:.5f}' if seconds else 'missing'} | {ratio} | {note} |")
    return "\n".join(lines)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    found = [f"{peer} {installed.get(peer, 'missing')}" for peer in PEERS]
    kernels = ", ".join(_core.kernels())
    return (
        f"{model}, {os.cpu_count()} cores; kernels {kernels}; Python {platform.python_version()}; {'; '.join(found)}."
    )


def pytest_sessionfinish(session):
    """Write the tables of this session; those of other jobs stay as they are."""
    if not rows:
        return
    marker = "<!-- tables: written by the benches -->"
    head, _, old = RESULTS.read_text(encoding="utf-8").partition(marker) if RESULTS.exists() else ("", "", "")
    tables = {part.splitlines()[0]: f"### {part.strip()}" for part in old.split("### ")[1:]}
    tables |= {job: table(job) for job in rows}
    text = "\n\n".join([machine(), *tables.values()])
    print("\n" + text)
    RESULTS.write_text(f"{head}{marker}\n\n{text}\n", encoding="utf-8")
