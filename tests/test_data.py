"""Stage 1 from end to end on small logs: cleaning, cores, splits, texts. The slow twin below says what is right."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnlm_ref import data
from hnlm_ref.artifacts import Run, load_csr, load_json, load_jsonl, load_npy
from hnlm_ref.cli import load_stage
from hnlm_ref.console import UserError

HEADER = "user_id,item_id,rating,timestamp\n"


class Prepared:
    """A finished prep folder, in keys."""

    def __init__(self, folder, counts):
        self.folder, self.counts = folder, counts
        self.items = load_jsonl(folder / "items.jsonl")
        self.users = load_jsonl(folder / "users.jsonl")
        self.user_keys, self.item_keys = [u["key"] for u in self.users], [i["key"] for i in self.items]
        self.csr = {part: load_csr(folder, part, len(self.items)) for part in data.PARTS}

    def pairs(self, *parts):
        return {
            (self.user_keys[u], self.item_keys[i])
            for part in parts or data.PARTS
            for u, i in self.csr[part].pairs().tolist()
        }

    def history(self, user):
        u, train = self.user_keys.index(user), self.csr["train"]
        order = load_npy(self.folder / "train.order.npy")[train.indptr[u] : train.indptr[u + 1]]
        return [self.item_keys[i] for i in train.indices[order]]


def prepare(folder, log, seed=0, **knobs):
    """Run stage 1 on a CSV text (or a path) within this process."""
    path = log
    if isinstance(log, str):
        folder.mkdir(exist_ok=True)
        path = folder / "log.csv"
        path.write_text(log, encoding="utf-8")
    command = load_stage("prep")
    folder.mkdir(exist_ok=True)
    result = command.main_function(command.config(interactions=str(path), **knobs), Run(folder, seed=seed, out=folder))
    return Prepared(folder, result["counts"])


def rows(*lines):
    return HEADER + "".join(line + "\n" for line in lines)


# ---- the slow twin ----------------------------------------------------------------------------------------------


def slow_prep(log, seed, min_rating, duplicates, k, how, valid_ratio, test_ratio):
    """Stage 1 in plain Python: ({part: set of pairs}, users, items, {user: training items oldest first})."""
    best = {}
    for user, item, rating, time in log:
        if rating >= min_rating:
            old = best.setdefault((user, item), time)
            best[user, item] = min(old, time) if duplicates == "first" else max(old, time)
    while True:
        users, items = [u for u, _ in best], [i for _, i in best]
        kept = {(u, i): t for (u, i), t in best.items() if users.count(u) >= k and items.count(i) >= k}
        if len(kept) == len(best):
            break
        best = kept
    pairs = sorted(best)
    draws = dict(zip(pairs, np.random.default_rng(seed).random(len(pairs)).tolist(), strict=True))
    part = {}
    groups = [pairs] if how == "ratio-global" else [[p for p in pairs if p[0] == u] for u in sorted({u for u, _ in pairs})]
    if how == "time":
        groups = []
        moments = sorted(best.values())
        cuts = [moments[min(len(pairs) - 1, int(len(pairs) * (1 - r) + 0.5))] for r in (test_ratio, valid_ratio + test_ratio)] if pairs else []
        for pair in pairs:
            part[pair] = "test" if best[pair] >= cuts[0] else "valid" if best[pair] >= cuts[1] else "train"
    for group in groups:
        n = len(group)
        if how.startswith("leave"):
            ranked = sorted(group, key=lambda p: (best[p], p[1]), reverse=True)
            n_test, n_valid = 1, int(how == "leave-two")
        else:
            ranked = sorted(group, key=draws.get)
            n_test, n_valid = int(n * test_ratio + 0.5), int(n * valid_ratio + 0.5)
        n_test = min(n_test, n - 1)
        n_valid = min(n_valid, n - 1 - n_test)
        for place, pair in enumerate(ranked):
            part[pair] = "test" if place < n_test else "valid" if place < n_test + n_valid else "train"
    train = {p for p in pairs if part[p] == "train"}
    if how in ("ratio-global", "time"):
        known_users, known_items = {u for u, _ in train}, {i for _, i in train}
        pairs = [p for p in pairs if p in train or (p[0] in known_users and p[1] in known_items)]
    parts = {name: {p for p in pairs if part[p] == name} for name in data.PARTS}
    users, items = sorted({u for u, _ in pairs}), sorted({i for _, i in pairs})
    histories = {u: [i for _, i in sorted((p for p in train if p[0] == u), key=lambda p: (best[p], p[1]))] for u in users}
    return parts, users, items, histories


KEYS = st.sampled_from(["1", "7", "07", "7.0", "10", "2", "é", "B", "a", "None", "ß x"])
LOGS = st.lists(st.tuples(KEYS, KEYS, st.sampled_from([1, 3, 4, 4.5, 5]), st.integers(0, 6)), min_size=1, max_size=40)
HOWS = st.sampled_from(["ratio", "ratio-global", "leave-one", "leave-two", "time"])
RATIOS = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.4])


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    log=LOGS, seed=st.integers(0, 3), min_rating=st.sampled_from([1.0, 4.0]), duplicates=st.sampled_from(["first", "last"]),
    k=st.integers(1, 3), how=HOWS, valid_ratio=RATIOS, test_ratio=RATIOS,
)  # fmt: skip
def test_small_logs_come_out_as_in_the_slow_twin(
    tmp_path, monkeypatch, log, seed, min_rating, duplicates, k, how, valid_ratio, test_ratio
):
    monkeypatch.setenv("HNLM_QUIET", "1")
    text = HEADER + "".join(f"{u},{i},{r},{1_500_000_000 + t}\n" for u, i, r, t in log)
    parts, users, items, histories = slow_prep(log, seed, min_rating, duplicates, k, how, valid_ratio, test_ratio)
    knobs = {"min_rating": min_rating, "duplicates": duplicates, "k_core": k, "split": how}
    ratios = {"valid_ratio": valid_ratio, "test_ratio": test_ratio}
    if not parts["train"] or (not parts["test"] and how in ("ratio-global", "time")):
        with pytest.raises(UserError, match=r"core is empty|nothing is left"):
            prepare(tmp_path / "run", text, seed, **knobs, **ratios)
        return
    done = prepare(tmp_path / "run", text, seed, **knobs, **ratios)
    assert {name: done.pairs(name) for name in data.PARTS} == parts
    assert (done.user_keys, done.item_keys) == (users, items)
    assert {u: done.history(u) for u in users} == histories
