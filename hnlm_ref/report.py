"""What a finished run has to say: the table, a user's story in the terminal, and the page report.html.

Everything is read from the artifacts; seconds come from the manifests.
"""

import html
import json
import statistics
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np

from hnlm_ref import metrics
from hnlm_ref.artifacts import STAGES, Csr, Prep, Run, atomic, load_json, load_jsonl, load_npy
from hnlm_ref.console import UserError

N_HISTORY, N_PAIRS, N_MATCHES = 20, 5, 5  # Choice: what is shown of a user (the newest), and of a pair (the nearest)
N_EXPLORED = 200  # Choice: users in a page's explorer

Cells = list[list[str]]


class View:
    """A finished run, opened for reading. `eval_dir` is where stage 5 writes while it is not finished yet."""

    def __init__(self, folder: Path, eval_dir: Path | None = None, test: Csr | None = None):
        self.run, self.name = Run(folder), folder.resolve().name
        self.eval_dir, self._test = eval_dir or self.run.folder("eval"), test
        self.metrics: dict = load_json(self.eval_dir / "metrics.json")
        self.methods: dict[str, dict[str, dict]] = self.metrics["methods"]
        self.k = max(self.metrics["k"])
        self.stages = {stage: self.run.manifest(stage) for stage in STAGES if self.run.has(stage)}

    @cached_property
    def prep(self) -> Prep:
        return self.run.prep()

    @cached_property
    def known(self) -> Csr:
        return self.prep.train.union(self.prep.valid)

    @cached_property
    def generated(self) -> dict[str, Any]:
        """Stage 03's pairs, matches and replies; no pairs where the run has none."""
        if not self.run.has("generate"):
            return {"pairs": np.zeros((0, 2), np.int32), "texts": None}
        folder = self.run.folder("generate")
        arrays = {name: load_npy(folder / f"{name}.npy") for name in ("pairs", "matches", "match_scores")}
        texts = folder / "texts.jsonl"
        return {**arrays, "texts": load_jsonl(texts) if texts.exists() else None}

    def values(self, method: str, column: str) -> list[float]:
        """One number per seed."""
        return [seed[column] for seed in self.methods[method].values()]

    def mean(self, method: str, key: str) -> list[float]:
        """Means over seeds of a group of numbers; NaN where a group is empty."""
        seeds = [seed[key] for seed in self.methods[method].values()]
        rows = [list(seed.values()) if isinstance(seed, dict) else seed for seed in seeds]
        return np.mean(np.array(rows, float), axis=0).tolist()

    def training(self, method: str) -> list[dict]:
        """Manifests of a method's trainings, one per seed."""
        return [self.run.manifest(f"train/{method}/{seed}") for seed in self.methods[method]]

    def curves(self, method: str, key: str, by_second: bool) -> list[tuple[list[float], list[float]]]:
        """A column of log.jsonl, one curve per seed. By second: only where every epoch was timed (none was resumed)."""
        found = []
        for seed, manifest in zip(self.methods[method], self.training(method), strict=True):
            log = load_jsonl(self.run.dir / "train" / method / seed / "log.jsonl")
            times = np.cumsum([0, *manifest["timing"]["epoch_seconds"]])
            told = [row for row in log if row.get(key) is not None]
            if told and (not by_second or len(times) == len(log) + 1):
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
            story = {
                "key": self.prep.users[user]["key"],
                "history": history[:N_HISTORY],
                "n_history": len(history),
                "n_free": len(free),
                "pairs": [
                    self._pair(row, free, {m: table[n] for m, table in scores.items()}) for row in rows[:N_PAIRS]
                ],
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
        positive, matches = int(self.generated["pairs"][row, 1]), self.generated["matches"][row, :N_MATCHES]
        scores_of = self.generated["match_scores"][row, :N_MATCHES][matches >= 0].tolist()
        matches = matches[matches >= 0].tolist()

        def places(table: np.ndarray) -> list[int]:
            return [1 + int((table[free] > table[item]).sum()) for item in (positive, *matches)]

        return {
            "positive": positive,
            "matches": list(zip(matches, scores_of, strict=True)),
            "places": {method: places(table) for method, table in scores.items()},  # of the positive, then the matches
            "reply": self.generated["texts"] and self.generated["texts"][row],
        }


# ---- tables -----------------------------------------------------------------------------------------------------


def result_rows(named: Iterable[tuple[View, str, str]]) -> Cells:
    """Methods by metrics: mean and spread (sample standard deviation) over seeds, seconds of training."""
    found: Cells = []
    for view, method, label in named:
        columns = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in view.metrics["k"]]
        found = found or [["method", *columns, "seeds", "seconds"]]
        seconds = statistics.fmean(manifest["timing"]["seconds"] for manifest in view.training(method))
        cells = [spread_of(view.values(method, column)) for column in columns]
        found.append([label, *cells, str(len(view.methods[method])), f"{seconds:.1f}"])
    return found


def spread_of(values: list[float]) -> str:
    spread = f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def negative_rows(views: list[View]) -> Cells:
    """What the negatives of each source were: spread, hardness, and the share of false ones against chance."""
    found = [["negatives of", "examined", "distinct items", "most used", "hardness", "false (95 %)", "chance", "ratio"]]
    for view in views:
        for source, told in view.metrics["negatives"].items():
            share, low, high = told["false"]
            hard = "-" if told["percentile"] is None else f"{told['percentile']:.1%}"
            cells = [f"{told['n']:,}", f"{told['distinct_items']:,}", f"{told['top_item_share']:.2%}", hard]
            ratio = f"{share / told['chance']:.1f}" if told["chance"] else "-"
            cells += [f"{share:.2%} ({low:.2%} to {high:.2%})", f"{told['chance']:.2%}", ratio]
            found.append([label_of(view, source, views), *cells])
    return found


def list_rows(views: list[View]) -> Cells:
    """Popularity bias of the lists, mean over seeds."""
    found = [["lists of", *LISTS.values()]]
    return found + [
        [label, *(f"{value:.3f}" for value in view.mean(method, "lists"))] for view, method, label in name_all(views)
    ]


def label_of(view: View, method: str, views: list[View]) -> str:
    return method if len(views) == 1 else f"{view.name}: {method}"


def name_all(views: list[View]) -> list[tuple[View, str, str]]:
    """Every method of every run, and what it is called beside the others."""
    return [(view, method, label_of(view, method, views)) for view in views for method in view.methods]


def lay_out(cells: Cells) -> str:
    widths = [max(len(row[c]) for row in cells) for c in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def table(run_dir: Path) -> str:
    """Methods by metrics as text."""
    view = View(run_dir)
    marked = f"\nevaluated on a subset of {view.metrics['users']} users" if view.metrics["subset"] else ""
    return lay_out(result_rows(name_all([view]))) + marked


def head(view: View) -> str:
    """The run in one line."""
    counts, recommender = view.stages["prep"]["counts"], view.training(next(iter(view.methods)))[0]["knobs"]
    parts = " / ".join(f"{counts[part]:,}" for part in ("train", "valid", "test"))
    model = (
        f"language model {Path(view.stages['sft']['knobs']['model']).name}"
        if "sft" in view.stages
        else "no language model"
    )
    text = f"{view.name}: {counts['users']:,} users, {counts['items']:,} items, {parts} train / valid / test pairs"
    return f"{text}; {recommender['backbone']} with {recommender['dim']} dimensions; {model}"


def outcome(view: View) -> str:
    """Who is first, in a sentence."""
    means = {method: statistics.fmean(view.values(method, f"ndcg@{view.k}")) for method in view.methods}
    best, *others = sorted(means, key=lambda method: -means[method])
    second = f", before {others[0]} with {means[others[0]]:.4f}" if others else ""
    users = f"{view.metrics['users']:,} users" + (" (a subset)" if view.metrics["subset"] else "")
    return f"Over {users}, {best} has the highest ndcg@{view.k}: {means[best]:.4f}{second}."


def generated_line(view: View) -> str:
    """What stage 03 made, with the quartiles of the matches' similarity."""
    told = view.metrics["generated"]
    if not told:
        return "no generated negatives in this run"
    text = f"generated: {told['pairs']:,} pairs, {told['without_match']:,} without a matched item"
    if told["similarity"]:
        text += "; similarity, minimum, quartiles, maximum: " + ", ".join(
            f"{value:.3f}" for value in told["similarity"]
        )
    return text + "".join(f"; {n:,} replies {status}" for status, n in told["status"].items())


# ---- the terminal -----------------------------------------------------------------------------------------------


def show(run_dir: Path, key: str | None, as_json: bool) -> str:
    """A run, or one user of it, as coloured text or as JSON (case G07)."""
    view = View(run_dir)
    if key is None:
        if as_json:
            counts = {stage: manifest["counts"] for stage, manifest in view.stages.items()}
            seconds = {m: [manifest["timing"] for manifest in view.training(m)] for m in view.methods}
            return json.dumps({"metrics": view.metrics, "counts": counts, "timing": seconds}, ensure_ascii=False)
        tables = (lay_out(rows([view])) for rows in (comparison_rows, list_rows, negative_rows))
        return "\n\n".join([head(view), table(run_dir), *tables, generated_line(view)])
    numbers = [user["user"] for user in view.prep.users if user["key"] == key]
    if not numbers:
        example = view.prep.users[0]["key"]
        raise UserError(f"--user {key}: {view.run.dir / 'prep'} has no such user; a key looks like {example!r}")
    story = view.stories(numbers)
    return json.dumps(story, ensure_ascii=False) if as_json else "\n".join(_lines(story["users"][0], story["items"]))


def _lines(user: dict, titles: dict[int, str]) -> Iterable[str]:
    def place(pair: dict, n: int) -> str:
        told = ", ".join(f"{places[n]:,} ({method})" for method, places in pair["places"].items())
        return click.style(f"  place {told}", dim=True)

    held = set(user["held_out"])
    yield click.style(f"user {user['key']}", bold=True) + f": {user['n_history']} training items, the newest first"
    yield from (click.style(f"  {titles[item]}", dim=True) for item in user["history"])
    for pair in user["pairs"]:
        yield "\n" + click.style(f"took {titles[pair['positive']]}", bold=True) + place(pair, 0)
        for name, value in (pair["reply"] or {}).items():
            yield f"  {name}: {value}"
        yield "  generated negative, nearest items by similarity:" if pair["matches"] else "  no matched item"
        for n, (item, score) in enumerate(pair["matches"], 1):
            false = click.style("  held out: a false negative", fg="red") if item in held else ""
            yield f"  {score:+.3f}  {titles[item]}{false}{place(pair, n)}"
    for method, items in user["lists"].items():
        found = f": {len(held & set(items))} of {len(held)} held-out items found"
        yield "\n" + click.style(f"{method} recommends", bold=True) + found
        yield from (
            click.style(f"  {'✓' if i in held else ' '} {titles[i]}", fg="green" if i in held else None) for i in items
        )


# ---- the page ---------------------------------------------------------------------------------------------------

LISTS = {"coverage": "coverage", "gini": "Gini", "head_share": "head share"}
CURVES = (
    ("Convergence by epoch", "valid_ndcg@20", False, "epoch", "validation ndcg@20"),
    ("Convergence by second", "valid_ndcg@20", True, "seconds of training", "validation ndcg@20"),
    ("Hardness of the negatives", "neg_percentile", False, "epoch", "items scored below the negative"),
)
GROUPS = (
    ("Popularity bias", "by_popularity", "items, rarest to most popular", "recall"),
    ("Sparse users", "by_activity", "users, least to most active", "ndcg"),
)
CAPTIONS = {
    "Ranking quality": "Mean over seeds; the bar is a sample standard deviation to either side.",
    "Convergence by epoch": "What validation said after each epoch, one line per seed. The best epoch is tested.",
    "Convergence by second": "The same against the time spent in training.",
    "Hardness of the negatives": "Mean over each epoch, judged by the model of that moment; 1 is hardest.",
    "Popularity bias": "Ten groups of items with equal shares of the training interactions.",
    "Sparse users": "Five groups of users with equal shares of the training interactions.",
    "Spread of the lists": "How much of the catalogue is recommended, how unequally, and what the head gets.",
    "False negatives": "The bar is a 95 % interval; the upright mark is what chance would give.",
}


def draw(views: list[View]) -> dict[str, str]:
    """Title -> SVG for everything the artifacts have numbers of."""
    from hnlm_ref import pictures

    named, k = name_all(views), views[0].k
    points: list[pictures.Point] = []
    for view, method, label in named:
        values = view.values(method, f"ndcg@{k}")
        centre, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((label, centre, centre - spread, centre + spread, None))
    found = {"Ranking quality": pictures.intervals("quality", points, f"test ndcg@{k}")}
    for title, key, by_second, x_label, y_label in CURVES:
        series = {label: curves for view, method, label in named if (curves := view.curves(method, key, by_second))}
        if series:
            found[title] = pictures.curves(f"{key[:3]}{by_second:d}", series, x_label, y_label)
    for title, key, x_label, metric in GROUPS:
        means = {label: view.mean(method, key) for view, method, label in named}
        ticks = [str(n + 1) for n in range(len(next(iter(means.values()))))]
        groups = {label: [(range(1, len(ticks) + 1), values)] for label, values in means.items()}
        found[title] = pictures.curves(key, groups, x_label, f"{metric}@{k}", ticks)
    groups = {label: [(range(1, 4), view.mean(method, "lists"))] for view, method, label in named}
    found["Spread of the lists"] = pictures.curves("lists", groups, f"lists of {k}", "share", list(LISTS.values()))
    points = []
    for view in views:
        for source, told in view.metrics["negatives"].items():
            share, low, high = (100 * value for value in told["false"])
            points.append((label_of(view, source, views), share, low, high, 100 * told["chance"]))
    if points:
        found["False negatives"] = pictures.intervals("false", points, "held-out positives among the negatives, %")
    return found


def compare(views: list[View], metric: str) -> list[dict]:
    """Each method against the very first, paired over users by key; between runs of other users only the reason."""
    (base, first, against), *others = name_all(views)
    found: list[dict] = []
    for view, method, label in others:
        ours, theirs = view.per_user(method, metric), base.per_user(first, metric)
        try:
            told: dict = metrics.compare(*metrics.match_users(ours, theirs, (view.name, base.name)))
        except UserError as error:
            told = {"not compared": error.message}
        found.append({"method": label, "against": against, "metric": metric, **told})
    return found


def comparison_rows(views: list[View]) -> Cells:
    metric = f"ndcg@{views[0].k}"
    found = [[f"{metric}, paired over users", "difference", "95 % interval", "p"]]
    for told in compare(views, metric):
        cells = ["not comparable: other users", "", ""]
        if "p" in told:
            cells = [f"{told['difference']:+.4f}", f"{told['low']:+.4f} to {told['high']:+.4f}", f"{told['p']:.4f}"]
        found.append([f"{told['method']} against {told['against']}", *cells])
    return found


def write(views: list[View], path: Path, n_explored: int = N_EXPLORED) -> None:
    """Write the page: one file that needs no other, and no network."""
    parts = {
        "title": html.escape("HNLMRec: " + " and ".join(view.name for view in views)),
        "lead": "".join(f"<p>{html.escape(head(view))}. {html.escape(outcome(view))}</p>" for view in views),
        "tables": _table(result_rows(name_all(views))) + _table(comparison_rows(views)),
        "pictures": "".join(
            f"<figure><h3>{title}</h3>{svg}<figcaption>{CAPTIONS[title]}</figcaption></figure>"
            for title, svg in draw(views).items()
        ),
        "negatives": _table(negative_rows(views))
        + _table(list_rows(views))
        + "".join(f"<p>{html.escape(generated_line(v))}</p>" for v in views),
        "made": "".join(_made(view) for view in views),
        "data": json.dumps([_explorer(view, n_explored) for view in views], ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _explorer(view: View, n: int) -> dict:
    """Users evenly from the least to the most active, first those with generated negatives; what is shown first."""
    evaluated = ~np.isnan(load_npy(next((view.eval_dir / "per_user").glob("*.npy")))[0])
    with_pairs = np.isin(np.arange(view.prep.n_users), view.generated["pairs"][:, 0])
    chosen = np.flatnonzero(evaluated & with_pairs if (evaluated & with_pairs).any() else evaluated)
    chosen = chosen[np.argsort(view.prep.train.degrees()[chosen], kind="stable")]
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(n, len(chosen))).astype(int)]
    told = view.stories(chosen)
    users = told["users"]
    matched = [place for place, user in enumerate(users) if user["pairs"] and user["pairs"][0]["matches"]]
    first = min(matched, key=lambda place: abs(place - len(users) // 2), default=0)  # the middle, not the prettiest
    ours = [m for m in view.methods if view.training(m)[0]["knobs"]["sampler"].startswith("hnlm")]
    base = [m for m in view.methods if m not in ours]
    return {**told, "name": view.name, "first": first, "story": [base[0], ours[0]] if base and ours else None}


def _made(view: View) -> str:
    """Knobs, fingerprints and versions of every stage, folded away."""
    manifests = {**view.stages, **{f"train {method}": view.training(method)[0] for method in view.methods}}
    blocks = ""
    for name, manifest in manifests.items():
        told = {key: manifest[key] for key in ("seed", "knobs", "counts", "timing", "fingerprint", "versions")}
        blocks += f"<h3>{name}</h3><pre>{html.escape(json.dumps(told, ensure_ascii=False))}</pre>"
    name = html.escape(view.name)
    return f"<details class=card><summary>{name}: knobs, counts and seconds of every stage</summary>{blocks}</details>"


def _table(cells: Cells) -> str:
    def row(values: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(row(values, "td") for values in cells[1:])
    return (
        f"<div class=scroll tabindex=0><table><thead>{row(cells[0], 'th')}</thead><tbody>{body}</tbody></table></div>"
    )
