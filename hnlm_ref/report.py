"""What a finished run has to say: the table, a user's story in the terminal, and the page report.html."""

import html
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np

from hnlm_ref import metrics
from hnlm_ref.artifacts import atomic, load_json, load_npy
from hnlm_ref.console import UserError
from hnlm_ref.view import View

LISTS = ("coverage", "Gini", "head share")  # in the order of metrics.json
Cells = list[list[str]]


# ---- tables -----------------------------------------------------------------------------------------------------


def every(views: list[View]) -> list[tuple[View, str, str]]:
    """Every method of every run, and what it is called beside the others."""
    return [(view, method, view.prefix + method) for view in views for method in view.methods]


def result_rows(views: list[View]) -> Cells:
    """Methods by metrics: mean and spread (sample standard deviation) over seeds, seconds of a training's epochs."""
    columns = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in views[0].metrics["k"]]
    found = [["method", *columns, "seeds", "seconds"]]
    for view, method, label in every(views):
        seconds = statistics.fmean(sum(manifest["timing"]["epoch_seconds"]) for manifest in view.training(method))
        n_seeds, scores = len(view.methods[method]), (view.score(method, column) for column in columns)
        cells = [f"{mean:.4f}" + (f" ±{spread:.4f}" if n_seeds > 1 else "") for mean, spread in scores]
        of = f" (a subset of {view.metrics['subset']} users)" if view.metrics["subset"] else ""
        found.append([label + of, *cells, str(n_seeds), f"{seconds:.1f}"])
    return found


def comparison_rows(views: list[View]) -> Cells:
    metric = f"ndcg@{views[0].k}"
    found = [[f"{metric}, paired over users", "difference", "95 % interval", "p"]]
    for told in compare(views, metric):
        cells = ["not comparable: other users or another split", "", ""]
        if "p" in told:
            cells = [f"{told['difference']:+.4f}", f"{told['low']:+.4f} to {told['high']:+.4f}", f"{told['p']:.4f}"]
        found.append([f"{told['method']} against {told['against']}", *cells])
    return found


def negative_rows(views: list[View]) -> Cells:
    """What the negatives of each source were: spread, hardness, and the share of false ones against chance."""
    found = [["negatives of", "examined", "distinct items", "most used", "hardness", "false (95 %)", "chance", "ratio"]]
    for view in views:
        for source, told in view.metrics["negatives"].items():
            share, low, high = told["false"]
            hard = "-" if told["percentile"] is None else f"{told['percentile']:.1%}"
            cells = [f"{told['n']:,}", f"{told['distinct_items']:,}", f"{told['top_item_share']:.2%}", hard]
            chance = told["chance"]  # never 0: all are of users with something held out
            cells += [f"{share:.2%} ({low:.2%} to {high:.2%})", f"{chance:.2%}", f"{share / chance:.1f}"]
            found.append([view.prefix + source, *cells])
    return found


def quality_rows(views: list[View]) -> Cells:
    """What stage 03 itself found out about its negatives, on the validation part."""
    found: Cells = []
    for view in views:
        path = view.run.dir / "generate" / "quality.json"
        for source, figures in (load_json(path) if path.exists() else {}).items():
            found = found or [["on validation", *(name.replace("_", " ") for name in figures)]]
            found.append([view.prefix + source, *("-" if v is None else f"{v:.3f}" for v in figures.values())])
    return found


def list_rows(views: list[View]) -> Cells:
    """Popularity bias of the lists, mean over seeds."""
    shares = [(label, view.mean(method, "lists")) for view, method, label in every(views)]
    return [["lists of", *LISTS]] + [[label, *(f"{share:.3f}" for share in found)] for label, found in shares]


def lay_out(cells: Cells) -> str:
    widths = [max(len(row[c]) for row in cells) for c in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def head(view: View) -> str:
    """The run in one line."""
    counts, recommender = view.stages["prep"]["counts"], view.training(next(iter(view.methods)))[0]["knobs"]
    parts = " / ".join(f"{counts[part]:,}" for part in ("train", "valid", "test"))
    model = Path(view.stages["sft"]["knobs"]["model"]).name if "sft" in view.stages else "none"
    text = f"{view.name}: {counts['users']:,} users, {counts['items']:,} items, {parts} train / valid / test pairs"
    text += f" ({n:,} users without test items left out)" if (n := view.metrics["users_without_test"]) else ""
    return f"{text}; {recommender['backbone']} with {recommender['dim']} dimensions; language model: {model}"


def generated_line(view: View) -> str:
    """What stage 03 made, with the quartiles of the matches' similarity."""
    told = view.metrics["generated"]
    if not told:
        return "no generated negatives in this run"
    text = f"generated: {told['pairs']:,} pairs, {told['without_match']:,} without a matched item"
    quartiles = ", ".join(f"{value:.3f}" for value in told["similarity"] or ())
    text += f"; similarity, minimum, quartiles, maximum: {quartiles}" if quartiles else ""
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
        kinds = (result_rows, comparison_rows, list_rows, negative_rows)
        laid_out = (lay_out(cells).partition("\n") for rows in kinds if (cells := rows([view]))[1:])
        tables = (click.style(names, bold=True) + newline + lines for names, newline, lines in laid_out)
        return "\n\n".join([head(view), *tables, generated_line(view)])
    numbers = {user["key"]: user["user"] for user in view.prep.users}
    if key not in numbers:
        raise UserError(f"--user {key}: {run_dir / 'prep'} has no such user; a key looks like {next(iter(numbers))!r}")
    story = view.stories([numbers[key]])
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
        yield from (f"  {name}: {value}" for name, value in (pair["reply"] or {}).items() if value is not None)
        yield "  generated negative, nearest items by similarity:" if pair["matches"] else "  no matched item"
        for n, (item, score) in enumerate(pair["matches"], 1):
            false = click.style("  held out: a false negative", fg="red") if item in held else ""
            yield f"  {score:+.3f}  {titles[item]}{false}{place(pair, n)}"
    for method, items in user["lists"].items():
        found = f": {len(held & set(items))} of {len(held)} held-out items found"
        yield "\n" + click.style(f"{method} recommends", bold=True) + found
        for item in items:
            yield click.style(f"  {'✓' if item in held else ' '} {titles[item]}", fg="green" if item in held else None)


# ---- the page ---------------------------------------------------------------------------------------------------

CURVES = (
    ("Convergence by epoch", "valid_ndcg@20", False, "epoch", "validation ndcg@20"),
    ("Convergence by second", "valid_ndcg@20", True, "seconds of training", "validation ndcg@20"),
    ("Hardness of the negatives", "neg_percentile", False, "epoch", "items scored below the negative"),
)
GROUPS = (
    ("Popularity bias", "by_popularity", "items, rarest to most popular", "recall@{k}"),
    ("Sparse users", "by_activity", "users, least to most active", "ndcg@{k}"),
    ("Spread of the lists", "lists", "lists of {k}", "share"),
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

    named, k = every(views), views[0].k
    scores = {label: view.score(method, f"ndcg@{k}") for view, method, label in named}
    points: list[pictures.Point] = [(label, m, m - spread, m + spread, None) for label, (m, spread) in scores.items()]
    found = {"Ranking quality": pictures.intervals("quality", points, f"test ndcg@{k}")}
    for title, key, by_second, x_label, y_label in CURVES:
        series = {label: curves for view, method, label in named if (curves := view.curves(method, key, by_second))}
        if series:
            found[title] = pictures.curves(f"{key[:3]}{by_second:d}", series, x_label, y_label)
    for title, key, x_label, y_label in GROUPS:
        means = {label: view.mean(method, key) for view, method, label in named}
        groups = {label: [(range(1, 1 + len(values)), values)] for label, values in means.items()}
        ticks = LISTS if key == "lists" else ()
        found[title] = pictures.curves(key, groups, x_label.format(k=k), y_label.format(k=k), ticks)
    points = []
    for view in views:
        for source, told in view.metrics["negatives"].items():
            share, low, high = (100 * value for value in told["false"])
            points.append((view.prefix + source, share, low, high, 100 * told["chance"]))
    if points:
        found["False negatives"] = pictures.intervals("false", points, "held-out positives, %")
    return found


def compare(views: list[View], metric: str) -> list[dict]:
    """Each method against the very first, paired over users by key; between runs of other users only the reason."""
    (base, first, against), *others = every(views)
    found: list[dict] = []
    for view, method, label in others:
        ours, theirs = view.per_user(method, metric), base.per_user(first, metric)
        try:
            if view.split != base.split:
                raise UserError(f"{view.name} and {base.name} were split otherwise, or hold other data")
            told: dict = metrics.compare(*metrics.match_users(ours, theirs, (view.name, base.name)))
        except UserError as error:
            told = {"not compared": error.message}
        found.append({"method": label, "against": against, "metric": metric, **told})
    return found


def write(views: list[View], path: Path, n_explored: int = 200) -> None:
    """Write the page: one file that needs no other, and no network."""
    parts = {
        "title": html.escape("HNLMRec: " + " and ".join(view.name for view in views)),
        "lead": "".join(f"<p>{html.escape(head(view))}</p>" for view in views),
        "tables": _table(result_rows(views)) + _table(comparison_rows(views)),
        "pictures": "".join(
            f"<figure><h3>{title}</h3>{svg}<figcaption>{CAPTIONS[title]}</figcaption></figure>"
            for title, svg in draw(views).items()
        ),
        "negatives": _table(negative_rows(views)) + _table(quality_rows(views)) + _table(list_rows(views)),
        "generated": "".join(f"<p>{html.escape(generated_line(view))}</p>" for view in views),
        "made": "".join(_made(view) for view in views),
        "data": json.dumps([_explorer(view, n_explored) for view in views], ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    with atomic(path) as temporary:
        filled = re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], page)
        temporary.write_text(filled, encoding="utf-8", errors="replace")  # a folder's name may be no UTF-8


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
        blocks += f"<h3>{html.escape(name)}</h3><pre>{html.escape(json.dumps(told, ensure_ascii=False))}</pre>"
    name = html.escape(view.name)
    return f"<details class=card><summary>{name}: knobs, counts and seconds of every stage</summary>{blocks}</details>"


def _table(cells: Cells) -> str:
    if not cells[1:]:
        return ""

    def row(values: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    head, body = row(cells[0], "th"), "".join(row(values, "td") for values in cells[1:])
    return f"<div class=scroll tabindex=0><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
