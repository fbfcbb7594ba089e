"""`hnlm-ref compare`: methods x seeds of one preset, each method tuned by the same rules, one table.

    [grid.dns]
    pool_size = [2, 4, 8]

Every combination of a method's grid is trained with the first seed, under a name that says what it changes
("dns@pool_size=8"); the one with the best NDCG@20 on validation is trained with all seeds and evaluated on test.
Whatever is done already is skipped. Seconds per epoch are fair with --n-jobs 1 only. RUN/compare.json keeps the grid
and its results, RUN/compare.md the table.
"""

import itertools
import os
import statistics
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from hnlm_ref.artifacts import Run, atomic, save_json
from hnlm_ref.console import UserError, say
from hnlm_ref.knobs import StageCommand, unknown

# Said below the table.
SHARED = ("backbone", "dim", "n_layers", "lr", "lambda_reg", "batch_size", "n_epochs", "patience")


def settings(grid: dict[str, Any]) -> list[str]:
    """Every combination of a grid table as a suffix of the method's name; an empty grid is the method as it is.

    >>> settings({"pool_size": [2, 4], "lr": [0.01]})
    ['@pool_size=2@lr=0.01', '@pool_size=4@lr=0.01']
    """
    for knob, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"preset [grid]: {knob} = {values!r}: a list of values is wanted")
    combinations = itertools.product(*grid.values())
    return ["".join(f"@{k}={v}" for k, v in zip(grid, values, strict=True)) for values in combinations]


def run_stages(commands: Iterable[list[str]], n_jobs: int) -> None:
    """Run stage commands, `n_jobs` at a time; the first that fails ends it all once those running are through.

    Told to end, it ends them. Choice: memory is not estimated beforehand; `n_jobs` is the user's, and what is finished
    is kept.
    """
    running: list[subprocess.Popen] = []

    def call(command: list[str]) -> int:
        running.append(process := subprocess.Popen(command))
        return process.wait()

    with ThreadPoolExecutor(n_jobs) as pool:
        try:
            for future in as_completed([pool.submit(call, command) for command in commands]):
                if future.result() == -9:  # the system's way to say that memory is full
                    raise UserError("the system killed a stage, perhaps for want of memory; compare: lower --n-jobs")
                if code := future.result():
                    raise SystemExit(code)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def compare(
    run: Run, tables: dict[str, dict], stages: dict[str, StageCommand], backbones: tuple[str, ...], n_jobs: int
) -> str:
    """Do what is missing and give the table, Markdown.

    stages     the commands of "train" and "eval"
    backbones  each method is tuned and trained with each of them; none: with what the preset says
    n_jobs     trainings at a time, the threads shared out among them; no result depends on it
    Raises UserError for a setting that cannot be trained, also for want of a stage it reads, before anything runs.
    """
    grids: dict[str, dict] = tables.get("grid", {})
    # --methods may ask for some of the preset's methods only, and the preset may extend one that has others.
    asked = [*run.methods, *tables.get("run", {}).get("methods", ())]
    known = dict.fromkeys([*asked, *tables.get("methods", {}), *stages["train"].samplers])
    for name in grids:
        if name not in known:
            raise UserError(f"preset [grid.{name}]: there is no such method; {unknown(name, known)}")
    n_threads = max(1, (run.n_threads or os.cpu_count() or 1) // n_jobs)
    shared = {"preset": run.preset, "run_dir": run.dir, "device": run.device_knob}

    def train(method: str, seed: int) -> list[str]:
        return stages["train"].line({**shared, "method": method, "seed": seed, "n_threads": n_threads})

    # Tune: the first seed of every setting; validation says which one is kept.
    suffixes = [f"@backbone={backbone}" for backbone in backbones] or [""]
    tried = {
        method + suffix: [method + suffix + setting for setting in settings(grids.get(method, {}))]
        for suffix in suffixes
        for method in run.methods
    }
    every = [variant for variants in tried.values() for variant in variants]
    configs: list[Any] = []
    for variant in every:
        configs.append(stages["train"].configure(tables, ("[grid]", {"method": variant})))
        if every.count(variant) > 1:
            raise UserError(f"preset [grid]: {variant} is there twice")
    if len(every) > len(tried) and not run.manifest("prep")["counts"]["valid"]:
        raise UserError(f"{run.dir / 'prep'} has no validation part to choose settings on; run prep with a valid_ratio")
    if len({len(variants) for variants in tried.values()}) > 1:
        say("the tuning budgets differ: " + ", ".join(f"{m} {len(vs)} settings" for m, vs in tried.items()))
    for stage in {stage: None for cfg in configs for stage in stages["train"].reads(cfg, run)}:
        run.folder(stage)
    run.check_test()
    run_stages((train(variant, run.seed) for variant in every), n_jobs)
    manifests = {v: run.manifest(f"train/{v}/seed{run.seed}") for v in every}
    scores = {m: {v: manifests[v]["counts"]["valid ndcg@20"] for v in vs} for m, vs in tried.items()}
    chosen = {method: max(found, key=lambda v: found[v]) for method, found in scores.items()}

    # Train the chosen with all seeds, and evaluate.
    seeds = range(run.seed, run.seed + run.n_seeds)
    run_stages((train(variant, seed) for variant in chosen.values() for seed in seeds), n_jobs)
    words = {**shared, "methods": ",".join(chosen.values()), "n_seeds": run.n_seeds, "seed": run.seed}
    run_stages([stages["eval"].line(words)], 1)

    # One row per method: means over users, then over seeds; the test pairs users, each the mean of its seeds.
    from hnlm_ref import metrics
    from hnlm_ref.view import View

    view = View(run.dir)
    column = f"ndcg@{view.k}"
    means = {method: np.array(list(view.per_user(v, column).values())) for method, v in chosen.items()}
    rows: list[dict[str, Any]] = []
    for method, variant in chosen.items():
        trainings = view.training(variant)
        row: dict[str, Any] = {"method": method, "chosen": variant, "settings tried": len(tried[method])}
        for name in (f"recall@{view.k}", column):
            row[name], row[f"{name} spread"] = view.score(variant, name)
        row["seconds per epoch"] = statistics.fmean(t["timing"]["seconds_per_epoch"] for t in trainings)
        row["epochs to best"] = statistics.fmean(t["counts"]["best epoch"] for t in trainings)
        row["knobs"] = {knob: trainings[0]["knobs"][knob] for knob in SHARED}
        rows.append(row)
    for row in rows:
        others = [other for other in rows if other is not row]
        if others:
            best = max(others, key=lambda other: other[column])["method"]
            row["best other"], row["paired"] = best, metrics.compare(means[row["method"]], means[best])
    save_json(run.dir / "compare.json", {"grid": scores, "rows": rows})
    text = lay_out(rows, column)
    with atomic(run.dir / "compare.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def lay_out(rows: list[dict], column: str) -> str:
    """The rows as a Markdown table, and below it the knobs of the methods, told once for all alike (case E16)."""
    recall = column.replace("ndcg", "recall")
    lines = [
        f"| method | {recall} | {column} | s/epoch | best epoch | settings tried | {column} against the best other |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        both = [f"{row[name]:.4f} ± {row[f'{name} spread']:.4f}" for name in (recall, column)]
        against = "-"
        if "paired" in row:
            against = f"{row['paired']['difference']:+.4f} to {row['best other']}, p = {row['paired']['p']:.4f}"
        cells = [row["chosen"], *both, f"{row['seconds per epoch']:.2f}", f"{row['epochs to best']:.0f}"]
        lines.append(f"| {' | '.join([*cells, str(row['settings tried']), against])} |")
    shared: dict[str, list[str]] = {}
    for row in rows:
        shared.setdefault(", ".join(f"{k} {v}" for k, v in row["knobs"].items()), []).append(row["method"])
    lines += ["", *(f"* {', '.join(methods)}: {knobs}" for knobs, methods in shared.items())]
    return "\n".join(lines) + "\n"
