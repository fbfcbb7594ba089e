"""A run's results for other programs: raw keys instead of numbers, in common formats, written in blocks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
from polars import selectors
from polars.io.plugins import register_io_source

from hnlm_ref import metrics
from hnlm_ref.artifacts import atomic, load_npy
from hnlm_ref.console import UserError
from hnlm_ref.knobs import unknown
from hnlm_ref.view import View

BLOCK = 4096  # users or rows at a time, so that memory does not grow with their number (but for npz)

Block = dict[str, np.ndarray | pl.Series]  # equally long columns; vectors [n, d]


def export(run_dir: Path, what: str, kind: str, out: Path | None = None, method: str | None = None) -> list[Path]:
    """Write `what` of a run into the folder `out` (default RUN/export/WHAT) and give the files back.

    negatives        user, item (the positive), negative, score, source, text: one row per negative. Without a method
                     the matched items of the generated vectors (source "llm", score the similarity); with one, what
                     its trained sampler would draw (source "sampler", score the model's). text is the language
                     model's title where it wrote one, else the negative's
    embeddings       two files, user and item: key, vector
    recommendations  user, item, rank, score: the lists that were judged (training and validation items left out)

    Of several seeds the first is taken, of several methods the first. Formats: csv, parquet, jsonl, npz (one array per
    column), recbole (its atomic files, named as its data set WHAT expects them).
    """
    view = View(run_dir)
    name = method or next(iter(view.methods))
    if name not in view.methods:
        raise UserError(f"--method {name}: {unknown(name, view.methods)}")
    folder = view.run.folder(f"train/{name}/{next(iter(view.methods[name]))}")
    if what == "embeddings":
        tables = {f"{side}_embeddings": _embeddings(view, folder, side) for side in ("user", "item")}
    elif what == "recommendations":
        tables = {what: _recommendations(view, folder)}
    else:
        tables = {what: _negatives(view, folder if method else None)}
    out = out or run_dir / "export" / what
    out.mkdir(parents=True, exist_ok=True)
    suffixes = {"user_embeddings": "useremb", "item_embeddings": "itememb"}  # RecBole's
    paths = [out / (f"{what}.{suffixes.get(t, 'inter')}" if kind == "recbole" else f"{t}.{kind}") for t in tables]
    for path, blocks in zip(paths, tables.values(), strict=True):
        try:
            with atomic(path) as temporary, temporary.open("wb") as file:
                WRITERS[kind](file, map(pl.DataFrame, blocks))
        except (OSError, pl.exceptions.PolarsError) as error:  # Polars tells of a full disk in its own way
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    return paths


def _keys(rows: list[dict], name: str = "key") -> pl.Series:
    return pl.Series([row[name] for row in rows])  # each as long as it is: in an array all are as long as the longest


def _negatives(view: View, folder: Path | None) -> Iterator[Block]:
    users, items, titles = _keys(view.prep.users), _keys(view.prep.items), _keys(view.prep.items, "title")
    made, replies = view.generated, None
    if folder:
        drawn, pairs = load_npy(folder / "negatives.npy"), view.prep.train.pairs()
        pairs = pairs[np.isin(pairs[:, 0], drawn[:, 0])]  # users with a negative left, in the order of the draws
        pairs, negatives = np.repeat(pairs, len(drawn) // len(pairs), axis=0), drawn[:, 1]
        user_emb, item_emb = (load_npy(folder / f"{side}.npy", mmap=True) for side in ("user", "item"))
    elif view.run.has("generate"):
        rows, columns = np.nonzero(made["matches"] >= 0)
        pairs, negatives, replies = made["pairs"][rows], made["matches"][rows, columns], made["replies"]
        scores = made["match_scores"][rows, columns]
    else:
        raise UserError(f"{view.run.dir} holds no generated negatives; name a --method for those of its sampler")
    for start in range(0, len(pairs), BLOCK):
        block = slice(start, start + BLOCK)
        (user, item), negative = pairs[block].T, negatives[block]
        score = (user_emb[user] * item_emb[negative]).sum(1) if folder else scores[block]
        text = pl.Series([replies[row]["text"] for row in rows[block]]) if replies else titles[negative]
        source = np.full(len(user), "sampler" if folder else "llm")
        yield {
            "user": users[user], "item": items[item], "negative": items[negative], "score": score, "source": source,
            "text": text,
        }  # fmt: skip


def _embeddings(view: View, folder: Path, side: str) -> Iterator[Block]:
    keys, table = _keys(getattr(view.prep, f"{side}s")), load_npy(folder / f"{side}.npy", mmap=True)
    for start in range(0, len(keys), BLOCK):
        yield {f"{side}_key": keys[start : start + BLOCK], f"{side}_vector": np.array(table[start : start + BLOCK])}


def _recommendations(view: View, folder: Path) -> Iterator[Block]:
    users, items = _keys(view.prep.users), _keys(view.prep.items)
    user_emb, item_emb = load_npy(folder / "user.npy", mmap=True), load_npy(folder / "item.npy")
    for start in range(0, len(users), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(users)))
        found, scores = metrics.recommend(user_emb[block], item_emb, view.known.take(block), view.k)
        row, column = np.nonzero(found >= 0)
        columns = {"user": users[block[row]], "item": items[found[row, column]]}
        yield {**columns, "rank": (column + 1).astype(np.int32), "score": scores[row, column]}


# ---- formats ----------------------------------------------------------------------------------------------------

# RecBole's names and types; set alias_of_item_id to [neg_item_id] and the negatives share the items' vocabulary.
RECBOLE = {
    "user": "user_id:token", "item": "item_id:token", "negative": "neg_item_id:token", "score": "score:float",
    "rank": "rank:float", "source": "source:token", "text": "text:token_seq", "user_key": "uid:token",
    "item_key": "iid:token", "user_vector": "user_emb:float_seq", "item_vector": "item_emb:float_seq",
}  # fmt: skip


def _npz(file: BinaryIO, frames: Iterator[pl.DataFrame]) -> None:
    columns = {c.name: np.asarray(c.to_list()) if c.dtype == pl.String else c.to_numpy() for c in pl.concat(frames)}
    np.savez(file, allow_pickle=False, **columns)


def _stream(frames: Iterator[pl.DataFrame]) -> pl.LazyFrame:
    first = next(frames)

    def source(*_: object) -> Iterator[pl.DataFrame]:
        yield first
        yield from frames

    return register_io_source(source, schema=first.schema)


def _flat(frames: Iterator[pl.DataFrame]) -> pl.LazyFrame:
    """A vector as one field, its numbers parted by blanks."""
    return _stream(frames).with_columns(selectors.array().cast(pl.List(pl.String)).list.join(" "))


WRITERS: dict[str, Callable[[BinaryIO, Iterator[pl.DataFrame]], Any]] = {
    "csv": lambda file, frames: _flat(frames).sink_csv(file),
    "parquet": lambda file, frames: _stream(frames).sink_parquet(file),
    "jsonl": lambda file, frames: _stream(frames).sink_ndjson(file),
    "npz": _npz,
    "recbole": lambda file, frames: _flat(frames).rename(RECBOLE, strict=False).sink_csv(file, separator="\t"),
}
