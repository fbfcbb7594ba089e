"""Stage 1: turn a raw interaction log into clean, k-cored, split and numbered data with texts and profiles.

Paper: data sets and settings; item and user profiles. Reads the raw files. Writes prep/: users.jsonl, items.jsonl,
train|valid|test CSR, train.order.npy.

    python stages/01_prep.py --preset toy     # about 1 s on a CPU
"""

from dataclasses import dataclass

import numpy as np

from hnlm_ref.artifacts import Csr, Run, resolve_path, save_csr, save_jsonl, save_npy
from hnlm_ref.console import UserError, say
from hnlm_ref.knobs import knob, stage_command


@dataclass(frozen=True)
class PrepConfig:
    """Knobs of stage 1."""

    # data
    interactions: str = knob("toy", "the log: a file, a folder of a known data set, package:NAME/path, or toy")
    items: str | None = knob(None, "file of item texts; a folder or log that holds them needs none")
    format: str = knob("auto", "format of the log, by name (see stages/DATA.md), or auto")
    sep: str | None = knob(None, "separator of the log; found by looking unless given")
    header: bool | None = knob(None, "whether the log's first line names the columns; found by looking unless given")
    columns: tuple[str, ...] = knob((), "role=column pairs of the log: user, item, rating, time, text, title")
    item_columns: tuple[str, ...] = knob((), "role=column pairs of the item file: item, title, brand, categories, ...")
    encoding: str | None = knob(None, "encoding of the files, e.g. latin-1; UTF-8 unless the format says otherwise")
    time_unit: str = knob("auto", "unit of the times", ("auto", "s", "ms", "us", "ns", "order"))
    skip_bad_rows: bool = knob(False, "leave out and count rows that cannot be read, instead of stopping")
    # filters
    min_rating: float | None = knob(None, "rows below this rating are no interaction")
    date_from: str | None = knob(None, "first moment of the window (UTC, included), e.g. 2015-01-01")
    date_to: str | None = knob(None, "end of the window (UTC, excluded)")
    duplicates: str = knob("first", "which row of a repeated pair stays, by time", ("first", "last"))
    k_core: int = knob(1, "users and items with fewer interactions are dropped until none is left to drop", low=1)
    # split
    split: str = knob("ratio", "how the rows are parted", ("ratio",))
    valid_ratio: float = knob(0.1, "share of the rows for validation", low=0, high=1)
    test_ratio: float = knob(0.2, "share of the rows for the test", low=0, high=1)
    # text
    profiles: str = knob("template", "who writes the profiles", ("template",))
    profile_titles: int = knob(10, "titles of the newest training items in a user's profile", low=1)


def main(cfg: PrepConfig, run: Run) -> dict:
    from hnlm_ref import data, readers

    # Find the files and what they are.
    if cfg.interactions == "toy":
        log_path, items_path = data.make_toy_log(run.out, run.seed)
    else:
        log_path, items_path = readers.locate(resolve_path(cfg.interactions))
    if cfg.items:
        items_path = resolve_path(cfg.items)
    layout = readers.sniff(log_path, cfg.format, cfg.sep, cfg.header, cfg.encoding, cfg.columns)
    say(f"[prep] {log_path}: {layout}")

    # Read, filter, keep each pair once, and core to the fixed point.
    bad = readers.Bad(cfg.skip_bad_rows)
    (log,) = data.read_log([layout], bad, cfg.time_unit)
    counts: dict = {"format": str(layout), "time unit": log.unit, "rows": len(log), "bad rows skipped": len(bad.rows)}
    if cfg.min_rating is not None and log.rating is not None:
        log = data.count(counts, "below min_rating", log, log.rating >= cfg.min_rating)
    log = data.window(counts, log, cfg.date_from, cfg.date_to)
    n_rows = len(log)
    log = data.deduplicate(log, cfg.duplicates)
    counts["repeated pairs"] = n_rows - len(log)
    rows, counts["k-core passes"] = data.k_core(log.user, log.item, cfg.k_core)
    if not len(rows):
        k = data.largest_k(log.user, log.item) if len(log) else 0
        raise UserError(f"the {cfg.k_core}-core is empty ({len(log)} rows, largest k with data left: {k})")
    log = data.renumber(log.take(rows))

    # Part the rows; nobody is tested without a training row.
    rng = np.random.default_rng(run.seed)
    part = data.split(log, cfg.split, cfg.valid_ratio, cfg.test_ratio, rng)
    shape = (len(log.users), len(log.items))
    for number, name in enumerate(data.PARTS):
        mine = part == number
        save_csr(run.out, name, Csr.from_pairs(log.user[mine], log.item[mine], *shape))
        counts[name] = int(mine.sum())
    train = log.take(part == 0)
    order = data.oldest_first(train)
    save_npy(run.out / "train.order.npy", order)
    counts |= {"users": shape[0], "items": shape[1], "pairs": len(log)}

    # Texts and profiles; users' profiles see training rows only (case A20).
    texts = data.read_items(items_path, cfg, log.items, counts)
    save_jsonl(run.out / "items.jsonl", texts)
    newest = train.item[order[::-1]], train.user[order[::-1]]
    profiles = data.user_profiles(*newest, [t["title"] for t in texts], shape[0], cfg.profile_titles)
    rows_ = ({"user": n, "key": key, "profile": p} for n, (key, p) in enumerate(zip(log.users, profiles, strict=True)))
    save_jsonl(run.out / "users.jsonl", rows_)
    say(f"[prep] {shape[0]:,} users, {shape[1]:,} items, {len(log):,} pairs: {counts}")
    return {"counts": counts}


def files(cfg: PrepConfig) -> list[str]:
    return [name for name in (cfg.interactions, cfg.items) if name and name != "toy"]


command = stage_command("prep", PrepConfig, main, files=files)
if __name__ == "__main__":
    command()
