"""Stage 1: turn a raw interaction log into clean, k-core-filtered, split and numbered data with texts and profiles.

Paper: data sets, item and user profiles. Reads the raw files (stages/DATA.md). Writes prep/: users.jsonl, items.jsonl,
train|valid|test as CSR, train.order.npy; reviews.jsonl, skipped.jsonl and profiles.jsonl if asked for.

    python stages/01_prep.py --preset toy     # about 1 s on a CPU
"""

from dataclasses import dataclass, replace

import numpy as np

from hnlm_ref.artifacts import Csr, Prep, Run, resolve_path, save_csr, save_jsonl, save_npy
from hnlm_ref.console import UserError, say
from hnlm_ref.knobs import StageCommand, knob
from hnlm_ref.profiles import AskConfig, write_profiles


@dataclass(frozen=True)
class PrepConfig(AskConfig):
    """Knobs of stage 1. The defaults filter nothing; the presets hold the paper's settings."""

    # data
    interactions: str = knob("toy", "the log: a file, a folder of a known data set, package:NAME/path, or toy")
    items: str | None = knob(None, "file of item texts, if it is not found beside the log")
    valid_file: str | None = knob(None, "validation part of a ready split")
    test_file: str | None = knob(None, "test part of a ready split; the log is then its training part")
    format: str = knob("auto", "format of the log, see stages/DATA.md; auto looks at the file")
    sep: str | None = knob(None, "separator of the log, if it is detected wrongly")
    header: bool | None = knob(None, "whether the first line names the columns, if that is detected wrongly")
    encoding: str | None = knob(None, "encoding of log and items if it is not UTF-8, e.g. latin-1")
    columns: tuple[str, ...] = knob((), "role=column of the log; roles: user, item, rating, time, text")
    item_columns: tuple[str, ...] = knob((), "role=column of the items: item, title, brand, categories, description")
    time_unit: str = knob("auto", "unit of the times", ("auto", "s", "ms", "us", "ns", "date", "order"))
    skip_bad_rows: bool = knob(False, "leave out, count and list rows that cannot be read, instead of stopping")
    # filters
    min_rating: float | None = knob(None, "drop rows rated lower")
    date_from: str | None = knob(None, "start of the window, included: a date (UTC) or a number in the log's unit")
    date_to: str | None = knob(None, "end of the window, excluded")
    duplicates: str = knob("first", "which row of a repeated pair is kept, by time", ("first", "last"))
    k_core: int = knob(1, "drop users and items with fewer pairs, repeatedly, until none is left", low=1)
    # split
    split: str = knob("ratio", "how pairs are split", ("ratio", "ratio-global", "leave-one", "leave-two", "time"))
    valid_ratio: float = knob(0.1, "share of the pairs for validation", low=0, high=1)
    test_ratio: float = knob(0.2, "share of the pairs for the test", low=0, high=1)
    valid_from: str | None = knob(None, "split time: start of validation, written like date_from")
    test_from: str | None = knob(None, "split time: start of the test, likewise")
    # texts
    profiles: str = knob("template", "who writes the profiles; llm: profile_model or the endpoint", ("template", "llm"))
    profile_model: str = knob("tiny", "model that writes them: tiny, a folder, hub id, .gguf file or package:NAME/path")
    profile_titles: int = knob(10, "titles in a user's profile, newest first; max_user_tokens of sft cuts it", low=1)
    text_chars: int = knob(2000, "characters kept of an item's text", low=0)
    review_chars: int = knob(0, "characters kept of each training review; 0 writes none", low=0)
    published: tuple[int, ...] = knob((), "users, items, pairs in the paper, printed beside ours")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid_ratio + self.test_ratio > 1:
            raise UserError(f"valid_ratio {self.valid_ratio} and test_ratio {self.test_ratio} are more than 1 together")
        if self.published and (len(self.published) != 3 or min(self.published) <= 0):
            raise UserError(f"published {','.join(map(str, self.published))}: three positive numbers are wanted")


def told(counts: dict) -> str:
    """What happened to the rows, zeros left out."""
    shown = {name: count for name, count in counts.items() if count and name != "format"}
    return ", ".join(f"{k}: {v:,}" if isinstance(v, int) else f"{k}: {v}" for k, v in shown.items())


def compare(readings: dict[str, tuple[int, int, int]], published: tuple[int, ...]) -> None:
    """Print the paper's sizes beside ours under every reading of it, and name the nearest (case X44)."""
    say("[prep] users, items, pairs; published: {:,} {:,} {:,}".format(*published))
    distance = {}
    for name, ours in readings.items():
        distance[name] = sum(abs(np.log(o / p)) for o, p in zip(ours, published, strict=True))
        figures = (f"{o:>10,} ({o / p - 1:+.1%})" for o, p in zip(ours, published, strict=True))
        say(f"[prep] {name:55}" + " ".join(figures))
    say(f"[prep] nearest: {min(distance, key=lambda name: distance[name])}")


def main(cfg: PrepConfig, run: Run) -> dict:
    from hnlm_ref import data, readers

    # Find the files and what they are.
    source = resolve_path(cfg.interactions) if cfg.interactions != "toy" else data.make_toy_log(run.out, run.seed)
    log_path, items_path, *parts = readers.locate(source)
    parts = (log_path, cfg.valid_file or parts[0], cfg.test_file or parts[1])
    if parts[1] and not parts[2]:
        raise UserError(f"--valid-file {parts[1]} needs --test-file: a ready split has a test part")
    how = (cfg.sep, cfg.header, cfg.encoding, cfg.columns, cfg.time_unit)
    layouts = [readers.sniff(log_path, cfg.format, *how)]
    same = "sequence" if layouts[0].format == "sequence" else cfg.format  # two items of a user look like item, rating
    layouts += [readers.sniff(resolve_path(str(path)), same, *how) if path else None for path in parts[1:]]
    for layout in filter(None, layouts):
        say(f"[prep] {layout.path}: {layout}")
    ready = layouts[2] is not None  # a split that was made elsewhere
    by_time = cfg.split == "time" or cfg.date_from or cfg.date_to
    if by_time and "history" in layouts[0].columns and not ready:
        told_by = "a history, which orders a user's items but tells no time that users share"
        cure = "use leave-one, leave-two or ratio, and no dates"
        raise UserError(f"--date-from, --date-to or --split time: each line of {log_path} is {told_by}; {cure}")
    bad = readers.Bad(cfg.skip_bad_rows)
    log = data.read_logs(layouts, bad)
    counts = {"format": str(layouts[0]), "rows": len(log)}
    counts |= {"bad rows skipped": len(bad.rows), "rows with blanks around an id": bad.n_trimmed}

    if ready:
        say("[prep] a ready split is taken as it is: no filter, no k-core, no other split")
        log = data.ready_split(log, counts)
    else:
        # Filter, keep each pair once, and core to the fixed point.
        log = data.clean(log, cfg.min_rating, cfg.date_from, cfg.date_to, counts)
        log = pairs = data.deduplicate(log, cfg.duplicates, counts)
        counts["k-core passes"] = []
        log = data.renumber(data.k_core(log, cfg.k_core, counts["k-core passes"]))
        if not len(log):
            found = f"({len(pairs):,} rows, largest k with data left: {data.largest_k(pairs)})"
            cure = "lower k_core" if len(pairs) else "widen min_rating and the dates"
            raise UserError(f"{log_path}: the {cfg.k_core}-core is empty {found}; {cure}; {told(counts)}")

        # Part the pairs. Choice: held-out pairs of items or users without a training pair stay in the splits by user,
        # and are dropped where all rows are split together, by time or at random; both are counted.
        def split(log: data.Log) -> np.ndarray:
            ratios, starts = (cfg.valid_ratio, cfg.test_ratio), (cfg.valid_from, cfg.test_from)
            return data.split(log, cfg.split, ratios, starts, np.random.default_rng(run.seed))

        log = replace(log, part=split(log))
        if cfg.split.startswith("leave"):
            counts["pairs at the same time as another of their user"] = data.n_ties(log)
        if cfg.published:
            compare(data.published_readings(pairs, cfg.k_core, split), cfg.published)
        log = data.unseen(log, cfg.split in ("ratio-global", "time"), counts)
    log = data.renumber(log)
    counts |= {name: int((log.part == number).sum()) for number, name in enumerate(data.PARTS)}
    if not counts["train"] or (not counts["test"] and (ready or cfg.split in ("ratio-global", "time"))):
        raise UserError(f"{log_path}: nothing is left to train on or to test; {told(counts)}; choose another split")

    # Texts and profiles; a user's profile sees training rows only (case A20).
    in_log = log_path if cfg.item_columns else None
    items_path = resolve_path(cfg.items) if cfg.items else items_path or in_log
    texts = {"encoding": cfg.encoding, "columns": cfg.item_columns, "roles": readers.ITEM_ROLES}
    layout = readers.sniff(items_path, **texts) if items_path else None
    items = data.read_items(layout, log.items, cfg.text_chars, bad, counts)
    parted = [log.take(log.part == number) for number in range(3)]
    train, order = parted[0], data.oldest_first(parted[0])
    users = data.read_users(train, order, [item["title"] for item in items], cfg.profile_titles)
    sets = [Csr.from_pairs(part.user, part.item, len(users), len(items)) for part in parted]
    made = Prep(users, items, *sets[:2], order)
    reviews = []
    if cfg.review_chars and "text" in layouts[0].columns:
        reviews = data.read_reviews(layouts[0], train, cfg.review_chars, None if ready else cfg.min_rating)
    if cfg.profiles == "llm":
        reviews = list(reviews)
        counts |= write_profiles(cfg, made, reviews, cfg.profile_model, run)

    # Save.
    save_jsonl(run.out / "users.jsonl", users)
    save_jsonl(run.out / "items.jsonl", items)
    for name, pairs in zip(data.PARTS, sets, strict=True):
        save_csr(run.out, name, pairs)
    save_npy(run.out / "train.order.npy", order)
    if reviews:
        save_jsonl(run.out / "reviews.jsonl", reviews)
    if bad.rows:
        save_jsonl(run.out / "skipped.jsonl", bad.rows)
    counts |= {"users": len(users), "items": len(items), "pairs": len(log)}
    say(f"[prep] {told(counts)}")
    return {"counts": counts}


def files(cfg: PrepConfig) -> list[str]:
    model = cfg.profile_model if cfg.profiles == "llm" and cfg.endpoint is None else None
    names = (cfg.interactions, cfg.items, cfg.valid_file, cfg.test_file, model)
    return [name for name in names if name not in (None, "toy", "tiny")]


command = StageCommand("prep", PrepConfig, main, files=files)
if __name__ == "__main__":
    command()
