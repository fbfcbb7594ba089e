"""A finished run opened for reading: what report, terminal view and export share.

Numbers become what the log called them (keys, titles) only here and in the export.
"""

import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hnlm_ref import metrics
from hnlm_ref.artifacts import STAGES, Csr, Prep, Run, load_json, load_jsonl, load_npy
from hnlm_ref.console import UserError

N_HISTORY, N_PAIRS, N_MATCHES = 20, 5, 5  # Choice: what is shown of a user (the newest), and of a pair (the nearest)


def load_generated(run: Run) -> dict[str, Any]:
    """What stage 03 made, one row per pair it was asked about: no rows where the run has no stage 03.

    Returns pairs int32 [N, 2], matches int32 [N, m] (-1: none) and match_scores float32 [N, m], replies: in text mode N
    dicts with status, text and raw, else None. Stage 03 leaves out pairs without a readable reply; here they are back.
    """
    if not run.has("generate"):
        return {"pairs": np.zeros((0, 2), np.int32), "replies": None}
    folder = run.folder("generate")
    made: dict[str, Any] = {name: load_npy(folder / f"{name}.npy") for name in ("pairs", "matches", "match_scores")}
    if not (folder / "texts.jsonl").exists():
        return {**made, "replies": None}
    texts = load_jsonl(folder / "texts.jsonl")
    answered = [row["text"] is not None for row in texts]
    for name in ("matches", "match_scores"):
        table = np.full((len(texts), made[name].shape[1]), -1, made[name].dtype)
        table[answered] = made[name]
        made[name] = table
    made["pairs"] = np.array([(row["user"], row["item"]) for row in texts], np.int32)
    return {**made, "replies": [{key: row[key] for key in ("status", "text", "raw")} for row in texts]}


class View:
    """A finished run. `eval_dir` is where stage 5 writes while it is not finished yet, `test` what it has read."""

    prefix = ""  # of a method's name where several runs stand side by side

    def __init__(self, folder: Path, eval_dir: Path | None = None, test: Csr | None = None):
        self.run, self.name = Run(folder), folder.resolve().name
        self.eval_dir, self._test = eval_dir or self.run.folder("eval"), test
        if eval_dir is None:
            self.run.inputs(["eval"])  # what it was made from must still be there
        self.metrics: dict = load_json(self.eval_dir / "metrics.json")
        self.methods: dict[str, dict[str, dict]] = self.metrics["methods"]
        self.k = max(self.metrics["k"])
        stages = STAGES[: -1 if eval_dir else None]  # while stage 5 writes, its own folder is that of an older result
        self.stages = {stage: self.run.manifest(stage) for stage in stages if self.run.has(stage)}

    @cached_property
    def prep(self) -> Prep:
        return self.run.prep()

    @property
    def split(self) -> dict[str, str]:
        """Fingerprints of the arrays of prep/: equal where users, items and parts have the same numbers."""
        return {name: hash for name, hash in self.run.manifest("prep")["files"].items() if name.endswith(".npy")}

    @cached_property
    def known(self) -> Csr:
        return self.prep.train.union(self.prep.valid)

    @cached_property
    def generated(self) -> dict[str, Any]:
        return load_generated(self.run)

    def score(self, method: str, column: str) -> tuple[float, float]:
        """Mean over seeds and sample standard deviation, 0 for one seed alone."""
        values = [seed[column] for seed in self.methods[method].values()]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def mean(self, method: str, key: str) -> list[float]:
        """Means over seeds of a group of numbers; NaN where a group is empty."""
        seeds = [seed[key] for seed in self.methods[method].values()]
        rows = [list(seed.values()) if isinstance(seed, dict) else seed for seed in seeds]
        return np.mean(np.array(rows, float), axis=0).tolist()

    def training(self, method: str) -> list[dict]:
        """Manifests of a method's trainings, one per seed."""
        return [self.run.manifest(f"train/{method}/{seed}") for seed in self.methods[method]]

    def curves(self, method: str, key: str, by_second: bool) -> list[tuple[list[float], list[float]]]:
        """A column of log.jsonl, one curve per seed, by epoch or by seconds of training."""
        found = []
        for seed, manifest in zip(self.methods[method], self.training(method), strict=True):
            log = load_jsonl(self.run.dir / "train" / method / seed / "log.jsonl")
            times = np.cumsum([0, *manifest["timing"]["epoch_seconds"]])
            if told := [row for row in log if row.get(key) is not None]:
                x = [float(times[row["epoch"]]) if by_second else row["epoch"] for row in told]
                found.append((x, [row[key] for row in told]))
        return found

    def per_user(self, method: str, column: str) -> dict[str, float]:
        """A metric by raw user key, mean over seeds."""
        row, folder = self.metrics["columns"].index(column), self.eval_dir / "per_user"
        seeds = [load_npy(folder / f"{method}-{seed}.npy")[row] for seed in self.methods[method]]
        return {user["key"]: float(v) for user, v in zip(self.prep.users, np.mean(seeds, axis=0), strict=True)}

    def stories(self, numbers: Sequence[int] | np.ndarray) -> dict:
        """What there is to tell of the given users: {"users": [...], "items": {number: title}}.

        Lists and places are those of each method's first seed. A place is 1 for the item scored highest among all that
        the user does not know; a training item is placed among them as if it were new.
        """
        numbers = np.asarray(numbers)
        seen: set[int] = set()
        known, held_out = self.known.take(numbers), (self._test or self.run.test()).take(numbers)
        lists, scores = {}, {}
        for method, seeds in self.methods.items():
            folder = self.run.dir / "train" / method / next(iter(seeds))
            user_emb, item_emb = load_npy(folder / "user.npy", mmap=True)[numbers], load_npy(folder / "item.npy")
            lists[method] = metrics.recommend(user_emb, item_emb, known, self.k)[0]
            scores[method] = user_emb @ item_emb.T  # [n, I]
        users = []
        for n, user in enumerate(numbers):
            free = np.setdiff1d(np.arange(self.prep.n_items), known.row(n))
            history = self.prep.history(user)[::-1].tolist()
            rows = np.flatnonzero(self.generated["pairs"][:, 0] == user).tolist()
            rows.sort(key=lambda row: history.index(self.generated["pairs"][row, 1]))
            own_scores = {method: table[n] for method, table in scores.items()}
            story = {
                "key": self.prep.users[user]["key"],
                "history": history[:N_HISTORY],
                "n_history": len(history),
                "n_free": len(free),
                "pairs": [self._pair(row, free, own_scores) for row in rows[:N_PAIRS]],
                "lists": {method: table[n][table[n] >= 0].tolist() for method, table in lists.items()},
                "held_out": held_out.row(n).tolist(),
            }
            seen.update(story["history"], story["held_out"], *story["lists"].values())
            for pair in story["pairs"]:
                seen.update([pair["positive"], *(item for item, _ in pair["matches"])])
            users.append(story)
        items = ((item, self.prep.items[item]) for item in sorted(seen))
        return {"users": users, "items": {n: item["title"] or f"(no title) {item['key']}" for n, item in items}}

    def _pair(self, row: int, free: np.ndarray, scores: dict[str, np.ndarray]) -> dict:
        positive = int(self.generated["pairs"][row, 1])
        nearest = (self.generated[name][row, :N_MATCHES].tolist() for name in ("matches", "match_scores"))
        matches = [(item, score) for item, score in zip(*nearest, strict=True) if item >= 0]
        shown = [positive, *(item for item, _ in matches)]
        return {
            "positive": positive,
            "matches": matches,
            "places": {m: [1 + int((table[free] > table[i]).sum()) for i in shown] for m, table in scores.items()},
            "reply": self.generated["replies"] and self.generated["replies"][row],
        }


def open_runs(folders: Sequence[Path]) -> list[View]:
    """Several runs for one page. Raises UserError when they were evaluated with different K."""
    views = [View(folder) for folder in folders]
    ks = {tuple(view.metrics["k"]) for view in views}
    if len(ks) > 1:
        raise UserError(f"the runs were evaluated with different K, {sorted(ks)}; rerun eval with one --k")
    if len({view.name for view in views}) < len(views):
        for view in views:
            view.name = str(view.run.dir)
    for view in views if len(views) > 1 else ():
        view.prefix = f"{view.name}: "
    return views
