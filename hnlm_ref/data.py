"""From a raw log to numbered, cored, split data; texts and profiles.

Ids stay text (*key*) until `read_log` numbers them in sorted order; after that all is int32 arrays, one entry per
pair, sorted by (user, item), so that nothing depends on the order of the input rows (case A17).
"""

import html
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hnlm_ref.console import UserError
from hnlm_ref.readers import ITEM_ROLES, UNITS, Bad, Layout, frames, item_frames, sniff

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Log:
    """Rows of a log in numbers.

    users, items  keys in sorted order; a number is a place in them
    user, item    int32 [n]
    rating, time  float64 [n], or None where the file has none; `unit` is the time's, see readers.UNITS
    """

    users: pl.Series
    items: pl.Series
    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray | None
    time: np.ndarray | None
    unit: str | None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Log":
        """The rows of a mask or of an index array; the numbering stays."""
        picked = {n: a[rows] for n in ("user", "item", "rating", "time") if (a := getattr(self, n)) is not None}
        return replace(self, **picked)

    @property
    def n_users(self) -> int:
        return len(np.unique(self.user))

    @property
    def n_items(self) -> int:
        return len(np.unique(self.item))


def read_log(layouts: list[Layout], bad: Bad, time_unit: str = "auto") -> list[Log]:
    """Read files that share one numbering: one Log per file. Raises UserError when a file holds no row."""
    pools = {"user": pl.Categories.random(), "item": pl.Categories.random()}
    parts = []
    for layout in layouts:
        blocks: dict[str, list[pl.Series]] = {name: [] for name in ("user", "item", "rating", "time")}
        for frame in frames(layout, bad, time_unit):
            for role, pool in pools.items():
                blocks[role].append(frame[role].cast(pl.Categorical(pool)))
            for role in ("rating", "time"):
                blocks[role].append(frame[role])
        if not sum(map(len, blocks["user"])):
            raise UserError(f"{layout.path} holds no rows: {layout}")
        parts.append({role: pl.concat(series) for role, series in blocks.items()})
    numbered = {}
    for role in pools:  # codes of the pool -> places in sorted order
        distinct = pl.concat([part[role].unique() for part in parts]).unique()
        keys = distinct.cast(pl.String)
        order = keys.arg_sort().to_numpy()
        rank = np.empty(int(distinct.to_physical().max()) + 1, np.int32)
        rank[distinct.to_physical().to_numpy()[order]] = np.arange(len(order), dtype=np.int32)
        numbered[role] = keys.gather(order), [rank[part.pop(role).to_physical().to_numpy()] for part in parts]
    logs = []
    for part, user, item in zip(parts, numbered["user"][1], numbered["item"][1], strict=True):
        rating, time = (None if part[r].null_count() else part[r].to_numpy() for r in ("rating", "time"))
        unit = None if time is None else _unit(float(time[0])) if time_unit == "auto" else time_unit
        logs.append(Log(numbered["user"][0], numbered["item"][0], user, item, rating, time, unit))
    return logs


def _unit(time: float) -> str:
    from hnlm_ref.readers import unit_of

    return pl.select(unit_of(pl.lit(time))).item()


# ---- cleaning ---------------------------------------------------------------------------------------------------


def parse_time(text: str, unit: str | None) -> float:
    """A bound as a date (UTC) or a number in the file's own unit."""
    try:
        return float(text)
    except ValueError:
        pass
    if unit is None or unit == "order":
        raise UserError(f"{text!r}: the file has no dates to compare with (its time is {unit or 'missing'})")
    try:
        moment = np.datetime64(text, "ms").astype(np.int64) / 1000
    except ValueError as error:
        raise UserError(f"{text!r} is no date: write 2015-01-01, 2015-01-01T12:00:00 or a number") from error
    return float(moment * UNITS[unit])


def deduplicate(log: Log, keep: str = "first") -> Log:
    """Keep each pair once, its earliest (or latest) row; the result is sorted by (user, item) (case A11)."""
    cells = log.user.astype(np.int64) * len(log.items) + log.item
    if log.time is None:
        _, rows = np.unique(cells, return_index=True)
        return log.take(rows)
    order = np.lexsort((log.time if keep == "first" else -log.time, cells))
    cells = cells[order]
    new = np.ones(len(cells), bool)
    new[1:] = cells[1:] != cells[:-1]
    return log.take(order[new])


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> tuple[np.ndarray, list[int]]:
    """Drop users and items with fewer than k rows, again and again until none is left to drop (case A09).

    user, item  int32 [n], numbers; pairs are distinct
    Returns     (indices of the rows kept, ascending; number of rows left after every pass that dropped something)
    """
    rows = np.arange(len(user))
    sizes: list[int] = []
    while len(rows):
        keep = (np.bincount(user[rows])[user[rows]] >= k) & (np.bincount(item[rows])[item[rows]] >= k)
        if keep.all():
            break
        rows = rows[keep]
        sizes.append(len(rows))
    return rows, sizes


def largest_k(user: np.ndarray, item: np.ndarray) -> int:
    """The largest k whose k-core is not empty, by halving."""
    low, high = 1, min(int(np.bincount(user).max()), int(np.bincount(item).max()))
    while low < high:
        k = (low + high + 1) // 2
        rows, _ = k_core(user, item, k)
        low, high = (k, high) if len(rows) else (low, k - 1)
    return low


def count(counts: dict, name: str, log: Log, keep: np.ndarray) -> Log:
    counts[name] = int((~keep).sum())
    return log.take(keep)


def window(counts: dict, log: Log, start: str | None, end: str | None) -> Log:
    """Rows from `start` (included) to `end` (excluded), dates being UTC (case A13)."""
    for text, name in ((start, "before date_from"), (end, "from date_to on")):
        if text is not None:
            bound = parse_time(text, log.unit)
            assert log.time is not None
            log = count(counts, name, log, log.time >= bound if name == "before date_from" else log.time < bound)
    return log


def renumber(log: Log) -> Log:
    """Close the gaps in the numbering, keys in sorted order."""
    users, user = np.unique(log.user, return_inverse=True)
    items, item = np.unique(log.item, return_inverse=True)
    return replace(
        log,
        users=log.users.gather(users),
        items=log.items.gather(items),
        user=user.astype(np.int32),
        item=item.astype(np.int32),
    )


# ---- splitting --------------------------------------------------------------------------------------------------


def split(log: Log, how: str, valid_ratio: float, test_ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Part of every row: 0 train, 1 valid, 2 test, int8 [n].

    ratio      each user's rows at random; n * ratio rounded half up, one row at least stays in train (case A21)
    """
    n = np.bincount(log.user)[log.user]
    place = _place(log.user, rng.random(len(log)))
    n_test = np.minimum(np.floor(n * test_ratio + 0.5), n - 1)
    n_valid = np.minimum(np.floor(n * valid_ratio + 0.5), n - 1 - n_test)
    return np.where(place < n_test, 2, np.where(place < n_test + n_valid, 1, 0)).astype(np.int8)


def _place(user: np.ndarray, by: np.ndarray, *ties: np.ndarray) -> np.ndarray:
    """Place of every row among its user's rows when these are ordered by `by`, then `ties`; 0 is the first."""
    order = np.lexsort((*reversed(ties), by, user))
    starts = np.r_[0, np.cumsum(np.bincount(user))[:-1]]
    place = np.empty(len(user), np.int64)
    place[order] = np.arange(len(user)) - starts[user[order]]
    return place


def oldest_first(train: Log) -> np.ndarray:
    """Positions into the (user, item)-sorted rows, each user's oldest first; ties, and no time, go by item number."""
    time = train.time if train.time is not None else np.zeros(len(train))
    return np.lexsort((train.item, time, train.user)).astype(np.int32)


# ---- texts ------------------------------------------------------------------------------------------------------

TAGS = re.compile(r"<(script|style)\b.*?</\1\s*>|<[a-zA-Z/!][^<>]*>?", re.S | re.I)


def clean_text(text: str) -> str:
    """Entities and tags resolved, blanks joined."""
    return " ".join(TAGS.sub(" ", html.unescape(text)).split())


def read_items(path: Path | None, cfg: Any, keys: pl.Series, counts: dict) -> list[dict]:
    """One record per item number: key, title, text (brand, categories, description), profile."""
    found = {}
    if path is not None:
        layout = sniff(path, columns=cfg.item_columns, encoding=cfg.encoding, roles=ITEM_ROLES)
        wanted = pl.DataFrame({"item": keys})
        for frame in item_frames(layout, Bad(cfg.skip_bad_rows)):
            for row in frame.join(wanted, on="item", how="semi").iter_rows(named=True):
                found.setdefault(row["item"], row)
    records = []
    for n, key in enumerate(keys):
        row = found.get(key, {})
        title, *rest = (clean_text(plain_text(row.get(r))) for r in ("title", "brand", "categories", "description"))
        text = ". ".join(part for part in rest if part)
        records.append({"item": n, "key": key, "title": title, "text": text, "profile": item_profile(title, text)})
    counts["items without title"] = sum(not r["title"] for r in records)
    return records


def plain_text(value: str | None) -> str:
    """A field as text: a JSON list becomes its members joined by commas."""
    if value and value.startswith("[") and value.endswith("]"):
        try:
            return ", ".join(str(v) for v in json.loads(value))
        except ValueError:
            pass
    return (value or "").replace("|", ", ")


def user_profiles(items: np.ndarray, users: np.ndarray, titles: list[str], n_users: int, n_titles: int) -> list[str]:
    """Profile of every user from its training items, given newest first within each user."""
    newest: list[list[str]] = [[] for _ in range(n_users)]
    for u, i in zip(users.tolist(), items.tolist(), strict=True):
        if len(newest[u]) < n_titles and titles[i]:
            newest[u].append(titles[i])
    return [user_profile(titles) for titles in newest]


def item_profile(title: str, text: str, n_chars: int = 300) -> str:
    return ". ".join(part for part in (title, text[:n_chars].rstrip()) if part)


def user_profile(titles: Iterable[str]) -> str:
    """One sentence on the newest training items, newest first (train rows only: case A20)."""
    named = [f'"{title}"' for title in titles if title]
    return f"Lately took {', '.join(named)}." if named else "Nothing with a title was taken."


# ---- toy --------------------------------------------------------------------------------------------------------
TOY_GENRES = ("Cooking", "Astronomy", "Gardening", "Chess", "Sailing", "Jazz", "Pottery", "Hiking")
TOY_NOUNS = ("Handbook", "Starter Kit", "Poster", "Calendar", "Board Game", "Mug", "Notebook", "Puzzle", "Lamp", "Map")


def make_toy_log(folder: Path, seed: int, n_users: int = 60) -> tuple[Path, Path]:
    """Write a made-up log and its items as CSV: 80 items of 8 subjects; each user likes two and strays now and then."""
    rng = random.Random(seed)
    items = [f"{genre} {noun}" for genre in TOY_GENRES for noun in TOY_NOUNS]
    lines = ["user_id,item_id,rating,timestamp"]
    for u in range(n_users):
        liked = rng.sample(range(len(TOY_GENRES)), 2)
        own = [10 * g + n for g in liked for n in range(10)]
        taken = rng.sample(own, rng.randint(10, 16)) + rng.sample(range(len(items)), 4)
        rng.shuffle(taken)
        for step, i in enumerate(dict.fromkeys(taken)):
            rating = rng.choice((4, 5)) if i in own else rng.choice((2, 3, 4))
            lines.append(f"u{u:02d},i{i:02d},{rating},{1_420_070_400 + 86_400 * (10 * step + u)}")
    rows = [f"i{i:02d},{title},{title.split()[0]}" for i, title in enumerate(items)]
    log, catalogue = folder / "toy.csv", folder / "toy_items.csv"
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    catalogue.write_text("\n".join(["item_id,title,category", *rows]) + "\n", encoding="utf-8")
    return log, catalogue
