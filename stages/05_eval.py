"""Stage 5: rank the whole catalogue for every test user, compare the methods, and describe their negatives.

Paper: evaluation section. Reads prep/ (the only stage to open its test part), generate/ if it is there, train/*.
Writes eval/: metrics.json, comparisons.json (every method against the first, paired over users), report.html, and
per_user/METHOD-SEED.npy (float64 [n_columns, U], NaN for users not evaluated).

    python stages/05_eval.py --preset toy     # about 3 s on a CPU

metrics.json holds no seconds and nothing is rounded in it.
    k, columns                lengths of the lists; the rows of per_user/*.npy, "recall@10" ...
    users, users_without_test, subset     evaluated; left out for want of test items; null, or the --n-users asked for
    popularity_groups         10 groups of items with equal shares of the training interactions, the rarest first:
    activity_groups           5 groups of users likewise, the least active first: members, interactions, test_pairs
    methods.METHOD.SEED       every column's mean over users, and, K being the longest list,
        by_popularity         recall@K of the group's test pairs (found / held out)      [10], null: no pairs
        by_activity           mean ndcg@K over the group's users                         [5]
        lists                 coverage: share of the catalogue recommended to anyone; gini: of how often each item is;
                              head_share: share of all places given to the most popular 20 % of the items
    negatives.SOURCE          of users with test items: n, distinct_items, top_item_share (how often the most used item
                              serves), false (share that are test items of their user, with its 95 % interval: [share,
                              low, high]), chance (that share for uniform draws), percentile (share of the user's items
                              not trained on that the warm-up scores lower)
        SOURCE is a method (items its sampler picks with the trained vectors; of hnlm j alone, without e_hard), or
        "generated" (all matched items)
    generated                 pairs, without_match, similarity (minimum, quartiles, maximum), status of text replies
"""

from dataclasses import dataclass

import numpy as np

from hnlm_ref.artifacts import Csr, Run, load_npy, save_json, save_npy
from hnlm_ref.console import UserError, progress
from hnlm_ref.knobs import StageCommand, knob

N_POPULARITY, N_ACTIVITY = 10, 5


@dataclass(frozen=True)
class EvalConfig:
    k: tuple[int, ...] = knob((10, 20), "lengths K of the recommended lists, all evaluated in one pass", low=1)
    n_users: int | None = knob(None, "evaluate only so many users, drawn by the seed (metrics.json says so)", low=1)
    n_explored: int = knob(200, "users in the explorer of report.html, evenly from the least to the most active", low=1)


def main(cfg: EvalConfig, run: Run) -> dict:
    from hnlm_ref import _core, analyses, metrics, report
    from hnlm_ref.view import View, load_generated

    # What is found again: the test items. What can never be recommended: training and validation items (case C16).
    run.check_test()
    prep, test = run.prep(), run.test()
    users = np.flatnonzero(test.degrees() > 0)
    n_without = prep.n_users - len(users)
    subset = cfg.n_users if cfg.n_users is not None and cfg.n_users < len(users) else None
    if subset:
        users = np.sort(np.random.default_rng(run.seed).choice(users, subset, replace=False))
        test = Csr.from_pairs(*test.pairs()[np.isin(test.pairs()[:, 0], users)].T, test.n_rows, test.n_cols)
    known, held_out = prep.train.union(prep.valid).take(users), test.take(users)
    popularity, activity = np.bincount(prep.train.indices, minlength=prep.n_items), prep.train.degrees()
    item_groups = analyses.equal_groups(popularity, N_POPULARITY)
    user_groups = analyses.equal_groups(activity, N_ACTIVITY)
    test_users, test_items = test.pairs().T

    # One row of metrics per user, for every method and seed.
    (run.out / "per_user").mkdir(exist_ok=True)
    ks, results, negatives = tuple(dict.fromkeys(cfg.k)), {}, {}
    k = max(ks)
    for name in progress(run.trained(), desc="ranking", unit="training"):
        _, method, seed = name.split("/")
        folder = run.folder(name)
        user_emb, item_emb = load_npy(folder / "user.npy", mmap=True)[users], load_npy(folder / "item.npy")
        for side, table, numbers in (("user", user_emb, users), ("item", item_emb, range(prep.n_items))):
            for row in np.flatnonzero(~np.isfinite(table).all(1))[:1]:  # case C11
                raise UserError(f"{folder / side}.npy: the vector of {side} {numbers[row]} is not finite; train again")
        lists, _ = metrics.recommend(user_emb, item_emb, known, k, run.n_threads)  # int32 [n_users, K]
        ranks = _core.ranks_in_lists(lists, held_out.indptr, held_out.indices)  # int32 [test pairs]
        per_user = np.full((len(metrics.METRICS) * len(ks), prep.n_users), np.nan)  # [n_columns, U]
        of_users = metrics.from_ranks(ranks, held_out, ks)
        per_user[:, users] = list(of_users.values())
        save_npy(run.out / "per_user" / f"{method}-{seed}.npy", per_user)
        results.setdefault(method, {})[seed] = {
            **{column: metrics.mean(values) for column, values in of_users.items()},
            "by_popularity": analyses.group_means(ranks > 0, item_groups[test_items], N_POPULARITY),
            "by_activity": analyses.group_means(of_users[f"ndcg@{k}"], user_groups[users], N_ACTIVITY),
            "lists": analyses.describe_lists(lists, popularity),
        }
        negatives.setdefault(method, []).append(load_npy(folder / "negatives.npy"))

    # What the negatives were: the samplers' last choices, and all items matched to generated vectors.
    found, warm_up, generated = {}, None, None
    if run.has("sft"):
        warm_up = tuple(load_npy(run.folder("sft") / f"cf_{side}.npy") for side in ("user", "item"))
    if run.has("generate"):
        generated, pairs = analyses.describe_generated(load_generated(run))
        negatives["generated"] = [pairs]
    for source, drawn in progress(negatives.items(), desc="negatives", unit="source"):
        drawn = np.concatenate(drawn)
        drawn = drawn[test.degrees()[drawn[:, 0]] > 0]  # users with something held out
        if len(drawn):
            found[source] = analyses.describe_negatives(drawn, prep.train, test, warm_up, run.n_threads)

    told = {
        "k": list(ks),
        "columns": list(of_users),
        "users": len(users),
        "users_without_test": n_without,
        "subset": subset,
        "popularity_groups": analyses.describe_groups(item_groups, popularity, test_items, N_POPULARITY),
        "activity_groups": analyses.describe_groups(user_groups, activity, test_users, N_ACTIVITY),
        "methods": results,
        "negatives": found,
        "generated": generated,
    }
    save_json(run.out / "metrics.json", told)
    view = View(run.dir, run.out, test)
    compared = report.compare([view], f"recall@{k}") + report.compare([view], f"ndcg@{k}")
    save_json(run.out / "comparisons.json", compared)
    report.write([view], run.out / "report.html", cfg.n_explored)
    return {"counts": {"users": len(users), "users without test items": n_without}}


def reads(cfg: EvalConfig, run: Run) -> list[str]:
    return ["prep", *filter(run.has, ("sft", "generate")), *run.trained()]


command = StageCommand("eval", EvalConfig, main, reads=reads)
if __name__ == "__main__":
    command()
