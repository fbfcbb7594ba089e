"""From a raw log to numbered, cored, split data with texts and profiles.

Ids stay text (*key*) until `read_logs` numbers them in sorted order; after that a log is int32 arrays. Pairs are sorted
by (user, item) before anything is drawn, so no result depends on the order of the input rows (case A17).
"""

import bisect
import html
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hnlm_ref.artifacts import no_half_characters, resolve_path
from hnlm_ref.console import UserError
from hnlm_ref.readers import ITEM_ROLES, Bad, Layout, frames, locate, sniff, value_of

PARTS = ("train", "valid", "test")
PROFILE_CHARS = 300  # of an item's text in its template profile
TICKS = {"s": 1, "date": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}  # per second


@dataclass(frozen=True)
class Log:
    """Rows of a log in numbers.

    users, items  keys in sorted order; a number is a place in them
    user, item    int32 [n]
    part          int8 [n]: 0 train, 1 valid, 2 test; all 0 before a split
    rating, time  float64 [n], or None where the file has none; `unit` is the time's, see readers.UNITS
    """

    users: pl.Series
    items: pl.Series
    user: np.ndarray
    item: np.ndarray
    part: np.ndarray
    rating: np.ndarray | None = None
    time: np.ndarray | None = None
    unit: str | None = None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Log":
        """The rows of a mask or of an index array; the numbering stays."""
        arrays = {name: getattr(self, name) for name in ("user", "item", "part", "rating", "time")}
        return replace(self, **{name: array[rows] for name, array in arrays.items() if array is not None})

    def sizes(self) -> tuple[int, int, int]:
        """Users, items and rows."""
        users, items = (int(np.count_nonzero(np.bincount(numbers))) for numbers in (self.user, self.item))
        return users, items, len(self)


def read_logs(layouts: list[Layout | None], bad: Bad) -> Log:
    """Read the parts of a log, each from its file, None for a part without one. Raises UserError for an empty file."""
    units = {TICKS.get(layout.unit, 0): layout.unit for layout in layouts if layout and layout.unit}
    if len(units) > 1:
        told = " and ".join(units.values())
        raise UserError(f"the parts of the split have times in {told}; name --time-unit or drop them: --columns time=")
    pools = {role: pl.Categorical(pl.Categories.random()) for role in ("user", "item")}
    blocks: list[pl.DataFrame] = []
    sizes = []
    for layout in layouts:
        n_bad, n_blocks = len(bad.rows), len(blocks)
        # Ids go into a pool of strings block by block: what stays is four bytes a row, however long the ids.
        blocks += [frame.cast(pools) for frame in frames(layout, bad)] if layout else []  # type: ignore[arg-type]
        sizes.append(sum(map(len, blocks[n_blocks:])))
        if layout and not sizes[-1]:
            first = "".join(f" that can be read, line {row['line']}: {row['why']}" for row in bad.rows[n_bad:][:1])
            raise UserError(f"{layout.path} holds no rows{first}; it was read as {layout}")
    table = pl.concat(blocks)
    del blocks
    columns: dict[str, Any] = {"part": np.repeat(np.arange(len(sizes), dtype=np.int8), sizes)}
    for role in pools:
        codes = table.drop_in_place(role)
        distinct = codes.unique()
        keys, numbers = distinct.cast(pl.String), distinct.to_physical().to_numpy()
        rank = np.empty(numbers.max() + 1, np.int32)  # number in the pool -> place in sorted order
        rank[numbers] = keys.rank("ordinal") - 1
        columns |= {f"{role}s": keys.sort(), role: rank[codes.to_physical()]}
    for column in table:  # what the first file lacks is not looked at in the others
        columns[column.name] = None if column[0] is None else column.to_numpy()
    return Log(**columns, unit=next(iter(units.values()), None))


# ---- cleaning ---------------------------------------------------------------------------------------------------


def moment(text: str, unit: str | None) -> float:
    """A bound in the unit of the log: a date (UTC) such as 2015 or 2015-01-01, or a number in that unit already."""
    try:
        if unit in TICKS and re.fullmatch(r"\d{4}(-\d\d)*([T ][\d:.]+)?", text):
            return float(np.datetime64(text, "us").astype(np.int64)) / 1e6 * TICKS[unit]
        return float(text if unit and re.fullmatch(r"[-+.\de]+", text) else "none")
    except ValueError as error:
        wanted = f"it has no dates (unit of its times: {unit})" if unit not in TICKS else "write a date like 2015-01-31"
        raise UserError(f"{text!r} cannot be compared with the times of the log; {wanted}") from error


def clean(log: Log, min_rating: float | None, date_from: str | None, date_to: str | None, counts: dict) -> Log:
    """Rows of at least `min_rating`, from `date_from` (included) to `date_to` (excluded) (cases A11, A13)."""

    def without(rows: Any, name: str) -> Log:
        counts[name] = int(rows.sum())
        return log.take(~rows)

    if min_rating is not None and log.rating is not None:
        log = without(log.rating < min_rating, "below min_rating")
    elif min_rating is not None:
        counts["below min_rating"] = "not applied, the log has no ratings"
    if date_from is not None:
        log = without(log.time < moment(date_from, log.unit), "before date_from")  # type: ignore[operator]
    if date_to is not None:
        log = without(log.time >= moment(date_to, log.unit), "not before date_to")  # type: ignore[operator]
    return replace(log, rating=None)  # not needed any more, and large


def deduplicate(log: Log, keep: str, counts: dict) -> Log:
    """Each pair once, of its earliest part the "first" or "last" row in time; sorted by (user, item) (case A11)."""
    cells = log.user.astype(np.int64) * len(log.items) + log.item  # one number for each row's pair
    by = () if log.time is None else (log.time if keep == "first" else -log.time,)
    order = np.lexsort((*by, log.part, cells))
    same_pair, same_part = (np.diff(values[order], prepend=-1) == 0 for values in (cells, log.part))
    counts["repeated pairs"] = int((same_pair & same_part).sum())
    counts["held-out pairs also in an earlier part"] = int((same_pair & ~same_part).sum())
    return log.take(order[~same_pair])


def one_pass(log: Log, k: int) -> Log:
    """The rows whose user and item have k rows or more."""
    return log.take((np.bincount(log.user) >= k)[log.user] & (np.bincount(log.item) >= k)[log.item])


def k_core(log: Log, k: int, passes: list[int] | None = None) -> Log:
    """Drop users and items with fewer than k rows, again and again until none is left to drop (case A09).

    passes  receives the number of rows left after every pass that dropped something
    """
    while len(left := one_pass(log, k)) < len(log):
        log = left
        if passes is not None:
            passes.append(len(log))
    return log


def largest_k(log: Log) -> int:
    """The largest k whose k-core is not empty (by halving: a k-core holds the (k+1)-core)."""
    most = min(np.bincount(log.user).max(), np.bincount(log.item).max()) if len(log) else 0
    return bisect.bisect_left(range(1, most + 1), True, key=lambda k: not len(k_core(log, k)))


def renumber(log: Log) -> Log:
    """Close the gaps in the numbering; the keys stay in sorted order (case A07)."""
    columns: dict[str, Any] = {}
    for role, keys, numbers in (("user", log.users, log.user), ("item", log.items, log.item)):
        there = np.bincount(numbers, minlength=len(keys)) > 0
        columns |= {f"{role}s": keys.filter(there), role: (np.cumsum(there, dtype=np.int32) - 1)[numbers]}
    return replace(log, **columns)


def published_readings(pairs: Log, k: int, split_of: Callable[[Log], np.ndarray]) -> dict[str, tuple[int, int, int]]:
    """Sizes (users, items, pairs) under each reading of how the paper counted (case X44)."""
    cores = {
        f"{k}-core to the fixed point": k_core(pairs, k),
        f"one pass of the {k}-core": one_pass(pairs, k),
        f"users with {k} or more, items as they are": pairs.take((np.bincount(pairs.user) >= k)[pairs.user]),
    }
    counted = {}
    for name, log in cores.items():
        counted[f"{name}, all pairs"] = log.sizes()
        counted[f"{name}, training pairs"] = log.take(split_of(log) == 0).sizes()
    return counted


# ---- splitting --------------------------------------------------------------------------------------------------


def oldest_first(log: Log) -> np.ndarray:
    """Order of rows by user, then time; equal times, or none at all, go by item number (case A17). int32 [n]."""
    time = np.zeros(len(log)) if log.time is None else log.time
    return np.lexsort((log.item, time, log.user)).astype(np.int32)


def n_ties(log: Log) -> int:
    """Rows that share their user's time with another row: their order is the item's (case A17)."""
    return int(pl.DataFrame({"user": log.user, "time": log.time}).is_duplicated().sum())


def halves_up(share: Any) -> Any:
    """Whole numbers of rows, halves rounded up, also where floating point has a little less: 50 * 0.29, 5.6 - 2.1.

    >>> int(50 * 0.29 + 0.5), int(halves_up(50 * 0.29))
    (14, 15)
    """
    return np.floor(np.round(share, 6) + 0.5).astype(np.int64)


def split(
    log: Log, how: str, ratios: tuple[float, float], starts: tuple[str | None, str | None], rng: np.random.Generator
) -> np.ndarray:
    """Part of each row of a log sorted by (user, item): 0 train, 1 valid, 2 test. int8 [n].

    ratio         at random within each user: n * ratio rows, halves rounded up; train keeps one at least (case A21)
    ratio-global  at random over all rows
    leave-one     the user's last row is test; leave-two: the one before is valid as well; train keeps one at least
    time          test from `test_from` on, valid from `valid_from` on; where one is not given, the last `test_ratio`
                  of the rows, the `valid_ratio` of them before the test, equal times staying together (case A16)

    Of `ratios` and `starts` (bounds as in `moment`) the first is validation's, the second the test's.
    """
    n, (valid_ratio, test_ratio), (valid_from, test_from) = len(log), ratios, starts
    if how in ("leave-one", "leave-two", "time") and log.time is None:
        raise UserError(f"--split {how} needs times, which the log lacks; use ratio or --time-unit order for sequences")
    if how == "time":
        assert log.time is not None
        ordered = np.sort(log.time)

        def cut(text: str | None, ratio: float, end: float) -> float:
            """The time given, or that of the first of n * ratio rows that end before row `end`; none: infinity."""
            if text:
                return moment(text, log.unit)
            return ordered[min(n - 1, max(0, halves_up(end - n * ratio)))] if ratio else np.inf

        test = cut(test_from, test_ratio, n)
        valid = cut(valid_from, valid_ratio, float(np.searchsorted(ordered, test)) if test_from else n - n * test_ratio)
        if valid_from and valid >= test:
            raise UserError(f"valid_from {valid_from} is not before the test begins: validation would be empty")
        return np.where(log.time >= test, 2, np.where(log.time >= valid, 1, 0)).astype(np.int8)
    group = np.zeros(n, np.int32) if how == "ratio-global" else log.user
    sizes = np.bincount(group)
    if how.startswith("leave"):
        order = np.lexsort((-log.item, -log.time, group))  # type: ignore[operator]
        n_test, n_valid = np.ones_like(sizes), np.full_like(sizes, how == "leave-two")
    else:
        order = np.lexsort((rng.random(n), group))
        n_test, n_valid = (halves_up(sizes * ratio) for ratio in (test_ratio, valid_ratio))
    n_test = np.minimum(n_test, sizes - 1)
    n_valid = np.minimum(n_valid, sizes - 1 - n_test)
    place = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the group, 0 first
    part = np.empty(n, np.int8)
    part[order] = np.where(place < n_test[group[order]], 2, np.where(place < (n_test + n_valid)[group[order]], 1, 0))
    return part


def unseen(log: Log, drop: bool, counts: dict) -> Log:
    """Count the held-out rows whose user or item has no training row, and leave them out if asked (case A15)."""
    train = log.part == 0
    new_user, new_item = (~np.isin(numbers, numbers[train]) for numbers in (log.user, log.item))
    counts["held-out rows of unseen users"] = int(new_user.sum())
    counts["held-out rows of unseen items"] = int(new_item.sum())
    left_out = (new_user | new_item) & drop  # a row may be both
    counts["held-out rows left out"] = int(left_out.sum())
    return log.take(~left_out) if drop else log


def ready_split(log: Log, counts: dict) -> Log:
    """Each pair of a ready split once, in its earliest part; leaks are counted."""
    log = deduplicate(log, "first", counts)
    if log.time is not None and log.unit != "order":
        newest, train = np.full(len(log.users), -np.inf), log.part == 0
        np.maximum.at(newest, log.user[train], log.time[train])
        older = ~train & (log.time < newest[log.user])
        counts["held-out rows older than their user's last training row"] = int(older.sum())
    return unseen(log, True, counts)


# ---- texts ------------------------------------------------------------------------------------------------------

TAG = re.compile(
    r"<(script|style)\b.*?</\1\s*>|</?[a-z][a-z0-9]*(\s[^<>]*)?/?>|<!--.*?-->|<[a-z]+\s+[\w-]+=[^<>]*$", re.S | re.I
)
JUNK = re.compile(r"getTime\(|var aPageStart|^\s*[.#][\w-]+\s*\{")  # scripts and style sheets in Amazon's 2018 fields


def clean_text(text: str) -> str:
    """Entities resolved (twice: some are packed twice), tags and the scraper's scripts removed, blanks joined.

    >>> clean_text("Salt &amp;amp; <b>Pepper</b>  5 < 6")
    'Salt & Pepper 5 < 6'
    """
    text = no_half_characters(html.unescape(html.unescape(text)))
    return "" if JUNK.search(text) else " ".join(TAG.sub(" ", text).split())


def flat_text(value: Any) -> str:
    """A field of an item file as text: a list of texts, also a nested one, becomes its members joined by commas.

    It is written in JSON or, in a CSV file by pandas, in Python. "[2012]" is a text: a title may read so.
    """
    is_list = isinstance(value, str) and re.match(r"""\[\s*(['"[\]]|null|None)""", value)
    if is_list and isinstance(found := value_of(value), list):
        value = found
    if isinstance(value, list):
        return ", ".join(member for member in map(flat_text, value) if member.strip())
    return "" if value is None else str(value)


def read_items(layout: Layout | None, keys: pl.Series, max_chars: int, bad: Bad, counts: dict) -> list[dict]:
    """A record per item number: key, title, text (brand; categories; description or features), template profile.

    Values that read "None" or "null" are text (case A05). A title that is missing, or nothing but the scraper's
    markup, is "" and counted (case A04). Rows of items outside the catalogue are left out and counted.
    Raises UserError for a file whose rows are all outside: ids written otherwise, 7.0 for 7, would leave all untitled.
    """
    known: list[dict] = []
    n_rows = 0
    for frame in frames(layout, bad) if layout else ():
        n_rows += len(frame)
        mine = frame.join(pl.DataFrame({"item": keys}), on="item", how="semi", maintain_order="left")
        known += mine.iter_rows(named=True)
    if layout and not known:
        others = f"the ids in its column {layout.columns['item']!r} and those of the log, such as {keys[0]!r}, differ"
        raise UserError(f"{layout.path} tells of no item of the log: {others}; see --item-columns")
    found = {row["item"]: row for row in reversed(known)}  # an item's first row counts
    counts |= {"items without a row": len(keys) - len(found), "item rows outside the catalogue": n_rows - len(known)}
    counts |= {"item rows of an item that has one": len(known) - len(found)}
    counts |= {"items without title": 0, "titles cleaned": 0, "items without text": 0, "texts cut": 0}
    records = []
    for n, key in enumerate(keys):
        raw = {role: flat_text(found.get(key, {}).get(role)) for role in ITEM_ROLES[1:]}
        raw["categories"] = raw["categories"].replace("|", ", ")
        title, brand, categories, description, features = (clean_text(value) for value in raw.values())
        text = ". ".join(part for part in (brand, categories, description or features) if part)
        counts["items without title"] += not title
        counts["titles cleaned"] += title != raw["title"]
        counts["items without text"] += not text
        counts["texts cut"] += len(text) > max_chars
        text = text[:max_chars].rstrip()
        profile = ". ".join(part for part in (title, text[:PROFILE_CHARS].rstrip()) if part)
        records.append({"item": n, "key": key, "title": title, "text": text, "profile": profile})
    return records


def read_users(train: Log, order: np.ndarray, titles: list[str], n_titles: int) -> list[dict]:
    """A record per user number: key and a template profile of its newest training rows only, `order`'s last (A20)."""
    newest: list[list[str]] = [[] for _ in train.users]
    for row in order[::-1].tolist():
        mine, title = newest[train.user[row]], titles[train.item[row]]
        if title and len(mine) < n_titles:
            mine.append(f'"{title}"')
    told = [f"Lately took {', '.join(mine)}." if mine else "Took nothing that has a title." for mine in newest]
    return [{"user": n, "key": key, "profile": p} for n, (key, p) in enumerate(zip(train.users, told, strict=True))]


def read_reviews(layout: Layout, train: Log, max_chars: int, min_rating: float | None) -> Iterator[dict]:
    """Review texts of the training rows, sorted by (user, item); of two texts for one row the smaller stays.

    min_rating  that of `clean`: a row it leaves out has no say, though its pair be there by another row
    """
    on = {"user": train.users.gather(train.user), "item": train.items.gather(train.item)}
    on |= {} if train.time is None else {"time": pl.Series(train.time)}
    pairs = pl.DataFrame(on).with_columns(u=train.user, i=train.item)
    found = [
        frame.filter(pl.col("rating").fill_null(np.inf) >= (-np.inf if min_rating is None else min_rating))
        .join(pairs, on=list(on))
        .select(user="u", item="i", text=pl.col("text").str.slice(0, max_chars))
        for frame in frames(layout, Bad(skip=True), text=True)
    ]
    table = pl.concat(found).filter(pl.col("text") != "").sort("user", "item", "text")
    yield from table.unique(["user", "item"], keep="first", maintain_order=True).iter_rows(named=True)


# ---- looking at a file ------------------------------------------------------------------------------------------


def describe(path: str, **options: Any) -> str:
    """What a log is and what prep would make of it; nothing is written. `options` are those of readers.sniff."""
    log_path, *others = locate(resolve_path(path))
    bad, counts = Bad(skip=True), {}  # type: Bad, dict[str, Any]
    layout = sniff(log_path, **options)
    log = read_logs([layout], bad)
    pairs = deduplicate(log, "first", counts)
    users, items, n = pairs.sizes()
    lines = [
        f"{log_path}: {layout}",
        *(f"{name}: {file}" for name, file in zip(("item texts", "valid", "test"), others, strict=True) if file),
        f"{len(log):,} rows, {len(bad.rows):,} that cannot be read, {counts['repeated pairs']:,} repeated pairs",
        *(f"  line {row['line']}: {row['why']}" for row in bad.rows[:10]),
        f"{users:,} users x {items:,} items, {n:,} pairs, density {n / users / items:.2e}",
        *(histogram("rating", log.rating) if log.rating is not None else ["no ratings"]),
    ]
    if log.time is not None and log.unit in TICKS:
        years = (log.time / TICKS[log.unit] * 1e6).astype("datetime64[us]").astype("datetime64[Y]").astype(int) + 1970
        lines += histogram("year", years)
    lines.append(f"largest k with a k-core: {largest_k(pairs)}")
    for k in (2, 5, 10, 20):
        if len(core := k_core(pairs, k)):
            lines.append("  {}-core: {:,} users x {:,} items, {:,} pairs".format(k, *core.sizes()))
    return "\n".join(lines)


def histogram(name: str, values: np.ndarray) -> list[str]:
    """Bars of the distinct values, or of ten ranges if there are more than 30."""
    found, counts = np.unique(values, return_counts=True)
    if len(found) > 30:
        counts, edges = np.histogram(values, 10)
        found = edges[:-1]
    bars = ["#" * max(1, round(40 * c / counts.max())) if c else "" for c in counts]
    return [f"{name:>8}"] + [f"{v:>8g} {c:>12,} {bar}" for v, c, bar in zip(found, counts, bars, strict=True)]


# ---- toy --------------------------------------------------------------------------------------------------------

TOY_GENRES = ("Cooking", "Astronomy", "Gardening", "Chess", "Sailing", "Jazz", "Pottery", "Hiking")
TOY_NOUNS = ("Handbook", "Starter Kit", "Poster", "Calendar", "Board Game", "Mug", "Notebook", "Puzzle", "Lamp", "Map")


def make_toy_log(folder: Path, seed: int) -> Path:
    """Write a made-up log and its items as CSV: 60 users, 80 items of 8 subjects; a user likes two."""
    rng = random.Random(seed)
    items = [f"{genre} {noun}" for genre in TOY_GENRES for noun in TOY_NOUNS]
    lines = ["user_id,item_id,rating,timestamp"]
    for u in range(60):
        liked = rng.sample(range(len(TOY_GENRES)), 2)
        own = [10 * g + n for g in liked for n in range(10)]
        taken = rng.sample(own, rng.randint(10, 16)) + rng.sample(range(len(items)), 4)
        rng.shuffle(taken)
        for step, i in enumerate(dict.fromkeys(taken)):
            rating = rng.choice((4, 5)) if i in own else rng.choice((2, 3, 4))
            lines.append(f"u{u:02d},i{i:02d},{rating},{1_420_070_400 + 86_400 * (10 * step + u)}")
    rows = [f"i{i:02d},{title},{title.split()[0]}" for i, title in enumerate(items)]
    (folder / "toy.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "toy_items.csv").write_text("\n".join(["item_id,title,category", *rows]) + "\n", encoding="utf-8")
    return folder
