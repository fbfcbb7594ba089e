"""Stage 5: groups, lists and negatives by hand; what it writes, opens and refuses."""

import json
import shutil

import numpy as np
import pytest
from test_metrics import csr

from hnlm_ref import analyses, metrics
from hnlm_ref.artifacts import Csr, Run, load_csr, load_json, load_jsonl, load_npy, save_csr, save_npy
from hnlm_ref.cli import load_stage

METHODS = "uniform", "dns", "hnlm"  # of the toy run


def test_groups_hold_equal_shares_of_the_interactions():
    """Twelve interactions in two groups: 1 + 1 + 2 + 2 on one side, 6 on the other."""
    counts = np.array([6, 1, 1, 2, 2])
    assert analyses.equal_groups(counts, 2).tolist() == [1, 0, 0, 0, 0]
    assert analyses.equal_groups(np.array([1, 1, 1, 1]), 2).tolist() == [0, 0, 1, 1]  # ties are cut by number
    assert analyses.equal_groups(np.ones(400, int), 2).tolist() == [0] * 200 + [1] * 200
    assert analyses.equal_groups(np.arange(400) % 2, 2).tolist() == [0] * 200 + [0, 1] * 100
    assert analyses.equal_groups(np.array([0, 0]), 3).tolist() == [0, 0]
    assert analyses.equal_groups(np.array([0, 0, 7]), 5).tolist() == [0, 0, 2]  # the middle of all there is
    groups = analyses.describe_groups(analyses.equal_groups(counts, 2), counts, np.array([0, 3, 4]), 3)
    assert groups[0] == {"members": 4, "interactions": 6, "test_pairs": 2}
    assert groups[1] == {"members": 1, "interactions": 6, "test_pairs": 1}
    assert groups[2:] == [{"members": 0, "interactions": 0, "test_pairs": 0}]


def test_a_group_without_members_has_no_mean():
    assert analyses.group_means(np.array([1.0, 0.0, 2.0]), np.array([0, 0, 2]), 4) == [0.5, None, 2.0, None]


def test_the_spread_of_lists_is_counted_over_the_whole_catalogue():
    """Five items, item 0 the head; six places, three for item 0, two for item 1, one for item 2.

    Gini over (0, 0, 1, 2, 3): (0 x -4 + 0 x -2 + 1 x 0 + 2 x 2 + 3 x 4) / (5 x 6) = 16 / 30.
    """
    lists = np.array([[0, 1], [0, 1], [0, -1], [2, -1]])
    found = analyses.describe_lists(lists, np.array([9, 4, 3, 2, 1]))
    assert found == {"coverage": 0.6, "gini": pytest.approx(16 / 30), "head_share": 0.5}
    ends = np.array([[0, 79], [80, 399]])  # all are as popular: the first fifth by number is the head
    assert analyses.describe_lists(ends, np.ones(400, int))["head_share"] == 0.5
    assert analyses.describe_lists(np.array([[0, 1, 2]]), np.arange(8, 0, -1))["head_share"] == 2 / 3  # 1.6 are two
    odd = np.arange(400) % 2  # 80 of the 200 odd numbers are the head: 1 to 159
    assert analyses.describe_lists(np.array([[159, 161]]), odd)["head_share"] == 0.5


def test_false_negatives_are_held_against_chance():
    """User 0 took 2 of 6 items and holds out 1: chance 1/4; user 1 took 1 and holds out 2: chance 2/5.

    User 3 took 5 and holds out the last. Drawn: (0, 2) false, (0, 3) twice, (1, 4) false, (1, 5) false, (3, 5) false.
    """
    train, test = csr([[0, 1], [0], [0], [0, 1, 2, 3, 4]], 6), csr([[2], [4, 5], [], [5]], 6)
    pairs = np.array([[0, 2], [0, 3], [0, 3], [1, 4], [1, 5], [3, 5]], np.int32)
    found = analyses.describe_negatives(pairs, train, test, None, 1)
    assert (found["n"], found["distinct_items"], found["top_item_share"]) == (6, 4, 2 / 6)
    assert found["false"][0] == 4 / 6 and found["chance"] == pytest.approx((3 / 4 + 2 * 2 / 5 + 1) / 6)
    # Warm-up scores are the item numbers: of user 0's free items 2 3 4 5, none lies below 2 and one of three below 3;
    # of user 1's free items 1 2 3 4 5, three of four lie below 4, all below 5; user 3 has one.
    warm_up = np.ones((4, 1), np.float32), np.arange(6, dtype=np.float32)[:, None]
    hard = analyses.describe_negatives(pairs, train, test, warm_up, 1)["percentile"]
    assert hard == pytest.approx((0 + 2 * 1 / 3 + 3 / 4 + 1 + 0) / 6)


def test_generated_negatives_are_counted_and_paired_with_their_users():
    """Three pairs, the second without a match; of 0.1, 0.5 and 0.9 the quartiles are 0.3, 0.5 and 0.7."""
    made = {
        "pairs": np.array([[0, 1], [0, 2], [3, 0]], np.int32),
        "matches": np.array([[4, -1], [-1, -1], [0, 5]], np.int32),
        "match_scores": np.array([[0.5, -1], [-1, -1], [0.9, 0.1]]),
        "replies": [{"status": "ok"}, {"status": "bad"}, {"status": "ok"}],
    }
    told, pairs = analyses.describe_generated(made)
    assert told.pop("similarity") == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert told == {"pairs": 3, "without_match": 1, "status": {"ok": 2, "bad": 1}}
    assert pairs.tolist() == [[0, 4], [3, 0], [3, 5]]
    told, pairs = analyses.describe_generated({**made, "matches": np.full((3, 2), -1), "replies": None})
    assert told == {"pairs": 3, "without_match": 3, "similarity": None, "status": {}} and pairs.shape == (0, 2)


def test_metrics_json_says_what_a_slow_twin_says(toy_run):
    prep = Run(toy_run).prep()
    test = load_csr(toy_run / "prep", "test", prep.n_items)
    found = load_json(toy_run / "eval" / "metrics.json")
    cf_user, cf_item = (load_npy(toy_run / "sft" / f"cf_{side}.npy").astype(np.float64) for side in ("user", "item"))
    for method in ("uniform", "dns", "hnlm"):
        folder = toy_run / "train" / method / "seed0"
        scores = load_npy(folder / "user.npy").astype(np.float64) @ load_npy(folder / "item.npy").astype(np.float64).T
        recall, used = [], np.zeros(prep.n_items)
        for user in range(prep.n_users):
            known = {*prep.train.row(user).tolist(), *prep.valid.row(user).tolist()}
            ranking = [item for item in np.argsort(-scores[user], kind="stable").tolist() if item not in known][:20]
            used[ranking] += 1
            if len(test.row(user)):
                recall.append(len(set(ranking) & set(test.row(user).tolist())) / len(test.row(user)))
        told = found["methods"][method]["seed0"]
        assert told["recall@20"] == pytest.approx(np.mean(recall), abs=1e-12) and found["users"] == len(recall)
        assert told["lists"]["coverage"] == pytest.approx((used > 0).mean())
        drawn = load_npy(folder / "negatives.npy")
        false = np.mean([item in test.row(user) for user, item in drawn if len(test.row(user))])
        assert found["negatives"][method]["false"][0] == pytest.approx(false)
        warm_up = [(cf_item @ cf_user[u], u, j) for u, j in drawn if len(test.row(u))]
        below = [np.mean(np.delete(scores, [*prep.train.row(u), j]) < scores[j]) for scores, u, j in warm_up]
        assert found["negatives"][method]["percentile"] == pytest.approx(np.mean(below), abs=1e-4)
    assert sum(group["interactions"] for group in found["popularity_groups"]) == prep.train.nnz
    assert sum(group["test_pairs"] for group in found["activity_groups"]) == test.nnz
    per_user = load_npy(toy_run / "eval" / "per_user" / "dns-seed0.npy")
    assert per_user.shape == (len(found["columns"]), prep.n_users) and per_user.dtype == np.float64
    row = found["columns"].index("ndcg@20")
    assert metrics.mean(per_user[row]) == found["methods"]["dns"]["seed0"]["ndcg@20"]  # no rounding, case C18


def test_groups_and_negatives_are_those_of_loops_over_seeds_and_users(toy_run, tmp_path):
    """Two seeds, the second with its vectors turned round and other negatives; the first five users have no test.

    Nobody took the last item in training, and nothing was tuned or generated.
    """
    run = shutil.copytree(toy_run, tmp_path / "run", ignore=shutil.ignore_patterns("generate", "sft"))
    known = load_csr(run / "prep", "train", 80).pairs()
    save_csr(run / "prep", "train", Csr.from_pairs(*known[known[:, 1] < 79].T, 60, 80))
    save_npy(run / "prep" / "train.order.npy", np.arange((known[:, 1] < 79).sum()))
    prep = Run(run).prep()
    pairs = load_csr(run / "prep", "test", prep.n_items).pairs()
    pairs = pairs[pairs[:, 0] >= 5]
    pairs = pairs[np.count_nonzero(pairs[:, 0] == 5) - 1 :]  # user 5 has one test item
    save_csr(run / "prep", "test", Csr.from_pairs(*pairs.T, prep.n_users, prep.n_items))
    second = shutil.copytree(run / "train" / "dns" / "seed0", run / "train" / "dns" / "seed1")
    save_npy(second / "user.npy", -load_npy(second / "user.npy"))
    shutil.copy(run / "train" / "uniform" / "seed0" / "negatives.npy", second / "negatives.npy")
    words = "--preset", "toy", "--run-dir", str(run), "--methods", "dns", "--n-seeds", "2", "--k", "20,5,20"
    load_stage("eval").main([*words, "--n-users", "55"], standalone_mode=False)
    told = load_json(run / "eval" / "metrics.json")
    assert (told["users"], told["users_without_test"], told["subset"], told["k"]) == (55, 5, None, [20, 5])

    popularity = np.append(np.bincount(prep.train.indices), 0)
    item_groups, user_groups = analyses.equal_groups(popularity, 10), analyses.equal_groups(prep.train.degrees(), 5)
    n_negatives = 0
    for seed in (0, 1):
        folder = run / "train" / "dns" / f"seed{seed}"
        scores = load_npy(folder / "user.npy").astype(np.float64) @ load_npy(folder / "item.npy").astype(np.float64).T
        hits, ndcg = [[] for _ in range(10)], [[] for _ in range(5)]
        for user in range(5, prep.n_users):
            known, wanted = {*prep.train.row(user), *prep.valid.row(user)}, pairs[pairs[:, 0] == user][:, 1].tolist()
            ranking = [item for item in np.argsort(-scores[user], kind="stable").tolist() if item not in known][:20]
            gain = sum(1 / np.log2(place + 2) for place, item in enumerate(ranking) if item in wanted)
            ndcg[user_groups[user]].append(gain / sum(1 / np.log2(place + 2) for place in range(len(wanted))))
            for item in wanted:
                hits[item_groups[item]].append(item in ranking)
        found = told["methods"]["dns"][f"seed{seed}"]
        assert found["by_popularity"] == pytest.approx([np.mean(group) if group else None for group in hits])
        assert found["by_activity"] == pytest.approx([np.mean(group) if group else None for group in ndcg])
        n_negatives += (load_npy(folder / "negatives.npy")[:, 0] >= 5).sum()
        assert [group["test_pairs"] for group in told["popularity_groups"]] == [len(group) for group in hits]
    assert told["negatives"]["dns"]["n"] == n_negatives
    tested = [int((user_groups[pairs[:, 0]] == group).sum()) for group in range(5)]
    assert [group["test_pairs"] for group in told["activity_groups"]] == tested

    kept = []
    for seed in (0, 1):  # a subset is another one for another seed
        load_stage("eval").main(
            [*words, "--n-seeds", "1", "--seed", str(seed), "--n-users", "40"], standalone_mode=False
        )
        kept.append(np.flatnonzero(~np.isnan(load_npy(run / "eval" / "per_user" / f"dns-seed{seed}.npy")[0])).tolist())
    assert len(kept[0]) == len(kept[1]) == 40 and kept[0] != kept[1] and min(*kept[0], *kept[1]) >= 5


def test_no_seconds_stand_in_the_files_that_make_the_fingerprint(toy_run):
    manifest = load_json(toy_run / "eval" / "manifest.json")
    assert {"metrics.json", "comparisons.json", "per_user/hnlm-seed0.npy"} <= set(manifest["files"])
    assert list(manifest["inputs"]) == ["prep", "sft", "generate", *(f"train/{m}/seed0" for m in METHODS)]
    assert "report.html" not in manifest["files"] and (toy_run / "eval" / "report.html").exists()
    assert "seconds" not in (toy_run / "eval" / "metrics.json").read_text(encoding="utf-8")


def test_a_subset_of_users_is_marked_and_the_others_are_nan(toy_run, tmp_path, cli):
    run = shutil.copytree(toy_run, tmp_path / "run")  # case G06
    assert cli("eval", "--preset", "toy", "--run-dir", run, "--n-users", "7", "--k", "10,20").returncode == 0
    found = load_json(run / "eval" / "metrics.json")
    assert found["subset"] == found["users"] == 7 and found["k"] == [10, 20]
    per_user = load_npy(run / "eval" / "per_user" / "dns-seed0.npy")
    whole = load_npy(toy_run / "eval" / "per_user" / "dns-seed0.npy")
    kept = ~np.isnan(per_user[0])
    assert kept.sum() == 7
    np.testing.assert_array_equal(per_user[:, kept], whole[:, kept])
    assert "a subset of 7 users" in cli("show", run).stdout
    page = (run / "eval" / "report.html").read_text(encoding="utf-8")
    assert "&quot;n_explored&quot;" not in page  # of the evaluation that was replaced


def test_the_test_part_is_opened_once_and_only_after_training(toy_run, tmp_path, monkeypatch):
    run = shutil.copytree(toy_run, tmp_path / "run")  # case C13
    opened = []
    monkeypatch.setattr(Run, "test", lambda self: opened.append(1) or load_csr(self.dir / "prep", "test", 80))
    (tmp_path / "out" / "per_user").mkdir(parents=True)  # of an evaluation that was interrupted
    command = load_stage("eval")
    command.main_function(command.config(), Run(run, methods=("uniform", "dns"), out=tmp_path / "out"))
    assert len(opened) == 1
    log = load_jsonl(run / "train" / "dns" / "seed0" / "log.jsonl")
    best = load_json(run / "train" / "dns" / "seed0" / "manifest.json")["counts"]["best epoch"]
    assert log[best - 1]["valid_ndcg@20"] == max(row["valid_ndcg@20"] for row in log)  # C14: the epoch is stored


def test_a_vector_that_is_no_number_is_refused_and_no_metrics_are_written(toy_run, tmp_path, cli):
    run = shutil.copytree(toy_run, tmp_path / "run")  # case C11
    shutil.rmtree(run / "eval")
    table = load_npy(run / "train" / "dns" / "seed0" / "user.npy")
    table[3, 5] = np.nan
    save_npy(run / "train" / "dns" / "seed0" / "user.npy", table)
    done = cli("eval", "--preset", "toy", "--run-dir", run)
    assert (
        done.returncode == 1 and "the vector of user 3 is not finite" in done.stderr and "Traceback" not in done.stderr
    )
    assert not (run / "eval").exists() and not (run / ".eval.partial" / "metrics.json").exists()


def test_comparisons_are_those_of_the_per_user_files(toy_run):
    told = {(c["method"], c["metric"]): c for c in json.loads((toy_run / "eval" / "comparisons.json").read_text())}
    row = load_json(toy_run / "eval" / "metrics.json")["columns"].index("ndcg@20")
    a, b = (load_npy(toy_run / "eval" / "per_user" / f"{method}-seed0.npy")[row] for method in ("dns", "uniform"))
    assert told["dns", "ndcg@20"]["p"] == metrics.sign_flip_p(a, b)
    assert told["dns", "ndcg@20"]["difference"] == pytest.approx(np.nanmean(a - b))
    assert set(told) == {(method, metric) for method in ("dns", "hnlm") for metric in ("recall@20", "ndcg@20")}


def test_rows_of_a_csr_come_in_the_order_asked_for():
    taken = csr([[0, 1], [], [2]], 3).take(np.array([2, 1, 0]))
    assert (taken.indptr.tolist(), taken.indices.tolist()) == ([0, 1, 1, 3], [2, 0, 1])
    assert Csr.take(taken, np.array([], int)).nnz == 0
