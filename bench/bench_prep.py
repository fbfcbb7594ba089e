"""Preparation at size: a made-up log in the layout of Amazon's 2018 reviews, and our k-core against other people's.

python bench/bench_prep.py 1 3 10      # million lines: makes a file, prepares it, prints a row; 0.5 GB a million
pytest bench/bench_prep.py             # k-core: ours, a pandas loop, RecBole's filter (pip install pandas recbole)

Measured on two cores of an AMD EPYC (rating >= 4, 10-core, 70/10/20 by user), Python 3.11, Polars 2.1, NumPy 2.4; in
brackets on a Xeon, before numbers were closed up by counting, and there with other jobs on both cores:

| lines | GB | seconds | peak MB | pairs |
|---|---|---|---|---|
| 1M | 0.52 | 2.7 (4.2, 7.0) | 233 (304) | 638,658 |
| 3M | 1.57 | 7.9 (13.4, 31.5) | 371 (424) | 1,927,015 |
| 10M | 5.22 | 28.2 (48.9, 119.8) | 841 (1136) | 6,420,658 |

Parquet of 100M rows with whole-number ids (rating >= 4, 10-core): 5.1 GB at the peak, 122 CPU seconds (5.6, 238).
10-core on the Xeon of 2,992,668 pairs: ours 0.21 s, pandas loop 0.25 s, RecBole 1.55 s; of 295,726: 14, 28 and 129 ms.
"""

import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hnlm_ref import data

REMARKS = (
    "Arrived two days early and works exactly as the box says.",
    "My nephew plays with it every single afternoon, the colours are bright and nothing has broken so far.",
    "The seam on the left side came apart after a week; the seller answered within an hour and sent another.",
    "For this price I had expected less, honestly: solid plastic, clear instructions, batteries included.",
    "Too small for adult hands, but as a present for a six-year-old it could hardly be better.",
)


def make_reviews(path: Path, n_lines: int, seed: int = 0) -> None:
    """Write `n_lines` reviews of about 500 bytes: skewed users and items, ratings 1 to 5, the years 2012 to 2018."""
    rng = np.random.default_rng(seed)
    n_users, n_items = n_lines // 20, n_lines // 40
    with path.open("wb") as file:
        for start in range(0, n_lines, 250_000):
            n = min(250_000, n_lines - start)
            user = (n_users * rng.random(n) ** 2.0).astype(np.int64)
            item = (n_items * rng.random(n) ** 2.2).astype(np.int64)
            text = [" ".join(REMARKS[r] for r in row) for row in rng.integers(0, len(REMARKS), (1000, 4))]
            frame = pl.DataFrame(
                {
                    "overall": rng.choice([1.0, 2.0, 3.0, 4.0, 5.0], n, p=[0.06, 0.06, 0.1, 0.2, 0.58]),
                    "verified": rng.random(n) < 0.9,
                    "reviewerID": pl.Series(user).cast(pl.String).str.zfill(13),
                    "asin": pl.Series(item).cast(pl.String).str.zfill(9),
                    "reviewText": pl.Series(text).gather(rng.integers(0, 1000, n)),
                    "summary": pl.Series(REMARKS).gather(rng.integers(0, len(REMARKS), n)).str.slice(0, 20),
                    "unixReviewTime": 1_325_376_000 + 86_400 * rng.integers(0, 2556, n),
                }
            ).with_columns(reviewerID=pl.lit("A") + pl.col("reviewerID"), asin=pl.lit("B") + pl.col("asin"))
            frame.write_ndjson(file)


def scale(millions: list[float]) -> None:
    """Prepare files of these sizes as a user would and print seconds and peak memory."""
    print("| lines | GB | seconds | peak MB | pairs |\n|---|---|---|---|---|", flush=True)
    for m in millions:
        with tempfile.TemporaryDirectory() as name:
            path, stage = Path(name) / "reviews.json", Path(__file__).parents[1] / "stages" / "01_prep.py"
            make_reviews(path, int(m * 1e6))
            knobs = ["--interactions", str(path), "--run-dir", name, "--min-rating", "4", "--k-core", "10", "--quiet"]
            program = (
                "import runpy, sys; sys.argv = sys.argv[1:]\n"
                "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
                # not ru_maxrss, which would begin with the peak of the process that made the file
                "finally: print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)"
            )
            start = time.perf_counter()
            command = [sys.executable, "-c", program, str(stage), *knobs]
            peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            seconds, size = time.perf_counter() - start, path.stat().st_size / 1e9
            pairs = sum(len(np.load(Path(name) / "prep" / f"{part}.indices.npy")) for part in data.PARTS)
            print(f"| {m:g}M | {size:.2f} | {seconds:.1f} | {peak} | {pairs:,} |", flush=True)


# ---- k-core -----------------------------------------------------------------------------------------------------


def ours(user: np.ndarray, item: np.ndarray, k: int) -> int:
    return len(data.k_core(data.Log(pl.Series(), pl.Series(), user, item, 0 * user), k))


def pandas_loop(user: np.ndarray, item: np.ndarray, k: int) -> int:
    pandas = pytest.importorskip("pandas")
    frame, size = pandas.DataFrame({"user": user, "item": item}), -1
    while len(frame) != size:
        size = len(frame)
        frame = frame[frame.groupby("user")["item"].transform("size") >= k]
        frame = frame[frame.groupby("item")["user"].transform("size") >= k]
    return size


def recbole(user: np.ndarray, item: np.ndarray, k: int) -> int:
    pandas = pytest.importorskip("pandas")
    filtering = pytest.importorskip("recbole.data.dataset.dataset").Dataset
    dataset = filtering.__new__(filtering)  # its k-core alone, without reading a file
    dataset.uid_field, dataset.iid_field, dataset.user_feat, dataset.item_feat = "user", "item", None, None
    dataset.config = {"user_inter_num_interval": f"[{k},inf)", "item_inter_num_interval": f"[{k},inf)"}
    dataset.inter_feat, dataset.logger = pandas.DataFrame({"user": user, "item": item}), logging.getLogger("recbole")
    dataset._filter_by_inter_num()
    return len(dataset.inter_feat)


@pytest.mark.parametrize("impl", [ours, pandas_loop, recbole], ids=lambda impl: impl.__name__)
@pytest.mark.parametrize("n", [300_000, 3_000_000])
def test_k_core(benchmark, impl, n):
    if benchmark.disabled and n > 1_000_000:
        pytest.skip("the large log is for timing only")
    rng = np.random.default_rng(0)
    user, item = (n // 20 * rng.random(n) ** 2).astype(np.int32), (n // 40 * rng.random(n) ** 2.2).astype(np.int32)
    _, first = np.unique(user.astype(np.int64) * n + item, return_index=True)
    user, item = user[first], item[first]
    benchmark.group = f"10-core of {len(user):,} pairs"
    kept = benchmark.pedantic(impl, (user, item, 10), rounds=3 if n < 1_000_000 else 1, warmup_rounds=0)
    assert kept == ours(user, item, 10) > 0


if __name__ == "__main__":
    scale([float(word) for word in sys.argv[1:]] or [1.0])
