"""Preparation at size: a made-up log in the layout of Amazon's 2018 reviews, and k-cores against other people's.

    python bench/bench_prep.py 1 3 10            # million lines: makes each file, prepares it, prints a table row
    python -m pytest bench/bench_prep.py         # k-core: ours, a pandas loop, RecBole's filter
"""

import numpy as np
import polars as pl

REMARKS = (
    "Arrived two days early and works exactly as the box says.",
    "My nephew plays with it every single afternoon, the colours are bright and nothing has broken so far.",
    "The seam on the left side came apart after a week; the seller answered within an hour and sent another.",
    "For this price I had expected less, honestly: solid plastic, clear instructions, batteries included.",
    "Too small for adult hands, but as a present for a six-year-old it could hardly be better.",
)


def make_reviews(path, n_lines: int, seed: int = 0) -> None:
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
