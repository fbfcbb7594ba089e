"""Stage 5: rank the whole catalogue for every test user, compare the methods, and say what their negatives were.

Paper: evaluation section. Reads prep/ (the only stage to open its test part), generate/ if it is there, train/*.
Writes eval/: metrics.json, comparisons.json (every method against the first, paired over users), report.html, and
per_user/METHOD-SEED.npy (float64 [n_columns, U], NaN for users not evaluated).

    python stages/05_eval.py --preset toy     # about 3 s on a CPU

metrics.json holds no seconds and nothing is rounded in it. "share" is [value, low, high] with a 95 % interval.
    k, columns                lengths of the lists; the rows of per_user/*.npy, "recall@10" ...
    users, users_without_test, subset     evaluated; left out for want of test items; null, or the --n-users asked for
    popularity_groups         10 groups of items with equal shares of the training interactions, the rarest first:
    activity_groups           5 groups of users likewise, the least active first: members, interactions, test_pairs
    methods.METHOD.SEED       every column's mean over users, and, K being the longest list,
        by_popularity         recall@K of the group's test pairs (found / held out)      [10], null: no pairs
        by_activity           mean ndcg@K over the group's users                         [5]
        lists                 coverage: share of the catalogue recommended to anyone; gini: of how often each item is;
                              head_share: share of all places given to the most popular 20 % of the items
    negatives.SOURCE          n, distinct_items, top_item_share (how often the most used item serves), false (share
                              that are held-out positives of their user), chance (the same for uniform draws),
                              percentile (mean place among the items the user does not know, 1 = scored highest)
        SOURCE is a method (its sampler's choice with the trained vectors), or "generated" (all matched items)
    generated                 pairs, without_match, similarity (minimum, quartiles, maximum), status of text replies
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from hnlm_ref.artifacts import Csr, Run, load_npy, save_json, save_npy
from hnlm_ref.console import UserError
from hnlm_ref.knobs import knob, stage_command

N_POPULARITY, N_ACTIVITY = 10, 5
HEAD = 0.2  # Choice: the head is the most popular fifth of the items


@dataclass(frozen=True)
class EvalConfig:
    """Knobs of stage 5."""

    k: tuple[int, ...] = knob((10, 20), "lengths K of the recommended lists, all evaluated in one pass", low=1)
    n_users: int | None = knob(None, "evaluate only so many users, drawn by the seed (metrics.json says so)", low=1)
    n_explored: int = knob(200, "users in the explorer of report.html, evenly from the least to the most active", low=1)


def equal_groups(counts: np.ndarray, n_groups: int) -> np.ndarray:
    """Cut into groups with equal shares of the total, smallest counts first: int64 [len(counts)], numbers of groups.

    A member belongs to the group in which the middle of its share falls, so one that holds more than a group's share
    leaves a group empty. Ties are cut in order of number.

    >>> equal_groups(np.array([6, 1, 1, 2, 2]), 2)
    array([1, 0, 0, 0, 0])
    """
    order = np.argsort(counts, kind="stable")
    middle = np.cumsum(counts[order]) - counts[order] / 2
    groups = np.empty(len(counts), np.int64)
    groups[order] = np.minimum(middle * n_groups / max(counts.sum(), 1), n_groups - 1)
    return groups


def describe_groups(groups: np.ndarray, counts: np.ndarray, test_pairs: np.ndarray, n_groups: int) -> list[dict]:
    """Size of every group; `test_pairs` holds the group of each held-out pair."""
    columns = {
        "members": np.bincount(groups, minlength=n_groups),
        "interactions": np.bincount(groups, counts, n_groups).astype(int),
        "test_pairs": np.bincount(test_pairs, minlength=n_groups),
    }
    return [{name: int(column[g]) for name, column in columns.items()} for g in range(n_groups)]


def group_means(values: np.ndarray, groups: np.ndarray, n_groups: int) -> list[float | None]:
    """Mean of `values` in each group, NaN left out; None where nothing is left."""
    kept = ~np.isnan(values)
    sums, n = np.bincount(groups[kept], values[kept], n_groups), np.bincount(groups[kept], minlength=n_groups)
    return [float(s / count) if count else None for s, count in zip(sums, n, strict=True)]


def describe_lists(items: np.ndarray, popularity: np.ndarray) -> dict[str, float]:
    """Popularity bias of lists int32 [n, K] (-1 pads) over a catalogue with `popularity` [I]."""
    from hnlm_ref import metrics

    used = np.bincount(items[items >= 0], minlength=len(popularity))
    head = np.argsort(-popularity, kind="stable")[: max(1, round(HEAD * len(popularity)))]
    return {
        "coverage": float((used > 0).mean()),
        "gini": metrics.gini(used),
        "head_share": float(used[head].sum() / max(used.sum(), 1)),
    }


def describe_negatives(pairs: np.ndarray, train: Csr, test: Csr, warm_up: tuple | None, n_threads: int) -> dict:
    """What (user, negative) pairs int32 [n, 2] were: spread, hardness, and how many are held-out positives.

    chance: the expected share for uniform draws from what the user did not train on, |T_u| / (I - |train_u|). A
    negative's percentile is the share of those items that the warm-up recommender scores below it.
    """
    from hnlm_ref import _core, metrics

    to_cell = np.array([test.n_cols, 1], np.int64)
    false = np.isin(pairs @ to_cell, test.pairs() @ to_cell)
    drawn, free = np.bincount(pairs[:, 0], minlength=test.n_rows), test.n_cols - train.degrees()
    used = np.bincount(pairs[:, 1], minlength=test.n_cols)
    told = {
        "n": len(pairs),
        "distinct_items": int((used > 0).sum()),
        "top_item_share": float(used.max() / len(pairs)),
        "false": metrics.share_interval(np.bincount(pairs[:, 0], false, test.n_rows), drawn.astype(float)),
        "chance": float((drawn * test.degrees() / np.maximum(free, 1)).sum() / len(pairs)),
        "percentile": None,
    }
    if warm_up:
        distinct, repeats = np.unique(pairs, axis=0, return_counts=True)  # in the order of a Csr's pairs
        asked = Csr.from_pairs(*distinct.T, *(test.n_rows, test.n_cols))
        indices = (train.indptr, train.indices, asked.indptr, asked.indices)
        ranks = _core.test_ranks(*warm_up, *indices, test.n_cols, n_threads)  # [nnz], none is beyond the last place
        below = (free[distinct[:, 0]] - ranks) / np.maximum(free[distinct[:, 0]] - 1, 1)
        told["percentile"] = float(np.average(below, weights=repeats))
    return told


def main(cfg: EvalConfig, run: Run) -> dict:
    from hnlm_ref import _core, metrics, report
    from hnlm_ref.view import View, load_generated

    # What is found again: the test items. What can never be recommended: training and validation items (case C16).
    prep, test = run.prep(), run.test()
    users = np.flatnonzero(test.degrees() > 0)
    if not len(users):
        raise UserError(
            f"{run.dir / 'prep'} holds no test items: nothing to evaluate; run prep with a test_ratio above 0"
        )
    n_without = prep.n_users - len(users)
    subset = cfg.n_users if cfg.n_users is not None and cfg.n_users < len(users) else None
    if subset:
        users = np.sort(np.random.default_rng(run.seed).choice(users, subset, replace=False))
        test = Csr.from_pairs(*test.pairs()[np.isin(test.pairs()[:, 0], users)].T, test.n_rows, test.n_cols)
    known, held_out = prep.train.union(prep.valid).take(users), test.take(users)
    popularity, activity = np.bincount(prep.train.indices, minlength=prep.n_items), prep.train.degrees()
    item_groups, user_groups = equal_groups(popularity, N_POPULARITY), equal_groups(activity, N_ACTIVITY)
    test_users, test_items = test.pairs().T

    # One row of metrics per user, for every method and seed.
    (run.out / "per_user").mkdir(exist_ok=True)
    k, results, negatives = max(cfg.k), {}, {}
    for name in run.trained():
        _, method, seed = name.split("/")
        folder = run.folder(name)
        user_emb, item_emb = load_npy(folder / "user.npy", mmap=True)[users], load_npy(folder / "item.npy")
        for side, table, numbers in (("user", user_emb, users), ("item", item_emb, np.arange(prep.n_items))):
            for row in np.flatnonzero(~np.isfinite(table).all(1))[:1]:  # case C11
                raise UserError(
                    f"{folder / side}.npy: {side} {numbers[row]} has a number that is not finite; train again"
                )
        lists, _ = metrics.recommend(user_emb, item_emb, known, k, run.n_threads)  # int32 [n_users, K]
        ranks = _core.ranks_in_lists(lists, held_out.indptr, held_out.indices)  # int32 [test pairs]
        per_user = np.full((len(metrics.METRICS) * len(cfg.k), prep.n_users), np.nan)  # [n_columns, U]
        of_users = metrics.from_ranks(ranks, held_out, cfg.k)
        per_user[:, users] = list(of_users.values())
        save_npy(run.out / "per_user" / f"{method}-{seed}.npy", per_user)
        results.setdefault(method, {})[seed] = {
            **{column: metrics.mean(values) for column, values in of_users.items()},
            "by_popularity": group_means((ranks > 0) * 1.0, item_groups[test_items], N_POPULARITY),
            "by_activity": group_means(of_users[f"ndcg@{k}"], user_groups[users], N_ACTIVITY),
            "lists": describe_lists(lists, popularity),
        }
        negatives.setdefault(method, []).append(load_npy(folder / "negatives.npy"))

    # What the negatives were: the samplers' last choices, and all items matched to generated vectors.
    found, warm_up, generated = {}, None, None
    if run.has("sft"):
        warm_up = tuple(load_npy(run.folder("sft") / f"cf_{side}.npy") for side in ("user", "item"))
    if run.has("generate"):
        made = load_generated(run)
        matched = made["matches"] >= 0  # [N, m]
        generated = {
            "pairs": len(matched),
            "without_match": int((~matched.any(1)).sum()),
            "similarity": np.quantile(made["match_scores"][matched], np.arange(5) / 4).tolist()
            if matched.any()
            else None,
            "status": Counter(reply["status"] for reply in made["replies"] or ()),
        }
        rows = np.repeat(made["pairs"][:, 0], matched.sum(1))
        negatives["generated"] = [np.stack([rows, made["matches"][matched]], axis=1)]
    for source, drawn in negatives.items():
        drawn = np.concatenate(drawn)
        drawn = drawn[test.degrees()[drawn[:, 0]] > 0]  # users with something held out
        if len(drawn):
            found[source] = describe_negatives(drawn, prep.train, test, warm_up, run.n_threads)

    save_json(
        run.out / "metrics.json",
        {
            "k": list(cfg.k),
            "columns": list(of_users),
            "users": len(users),
            "users_without_test": n_without,
            "subset": subset,
            "popularity_groups": describe_groups(item_groups, popularity, item_groups[test_items], N_POPULARITY),
            "activity_groups": describe_groups(user_groups, activity, user_groups[test_users], N_ACTIVITY),
            "methods": results,
            "negatives": found,
            "generated": generated,
        },
    )
    view = View(run.dir, run.out, test)
    save_json(
        run.out / "comparisons.json",
        [c for metric in ("recall", "ndcg") for c in report.compare([view], f"{metric}@{k}")],
    )
    report.write([view], run.out / "report.html", cfg.n_explored)
    return {"counts": {"users": len(users), "users without test items": n_without}}


def reads(cfg: EvalConfig, run: Run) -> list[str]:
    extra = [stage for stage in ("sft", "generate") if run.has(stage)]
    return ["prep", *extra, *run.trained()]


command = stage_command("eval", EvalConfig, main, reads=reads)
if __name__ == "__main__":
    command()
