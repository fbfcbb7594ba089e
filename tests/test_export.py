"""Export: every table in every format loads back equal, and works where it is meant to be used (case G01)."""

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from conftest import readme_code, run_measured

from hnlm_ref import export as module
from hnlm_ref.artifacts import Csr, Run, load_json, load_jsonl, load_npy, save_csr, save_json, save_jsonl, save_npy
from hnlm_ref.console import UserError
from hnlm_ref.export import WRITERS, export
from hnlm_ref.view import View

AWKWARD = 'Tab\there, "quoted" & a line\nbreak, Pokémon'


@pytest.fixture(scope="module")
def run(toy_run, tmp_path_factory):
    """The toy run with raw keys that tempt a reader: numbers with zeros in front, and a title full of separators."""
    folder = shutil.copytree(toy_run, tmp_path_factory.mktemp("export") / "run")
    for name in ("users", "items"):
        rows = load_jsonl(folder / "prep" / f"{name}.jsonl")
        save_jsonl(folder / "prep" / f"{name}.jsonl", ({**row, "key": f"00{n}"} for n, row in enumerate(rows)))
    items = load_jsonl(folder / "prep" / "items.jsonl")
    save_jsonl(folder / "prep" / "items.jsonl", ({**item, "title": AWKWARD} for item in items))
    return folder


def expected(run, what: str) -> dict[str, list]:
    """The table by a plain loop over the artifacts."""
    view, rows = View(run), []
    if what == "negatives":
        pairs, matches, scores = (load_npy(run / "generate" / f"{n}.npy") for n in ("pairs", "matches", "match_scores"))
        for (user, item), found, values in zip(pairs, matches, scores, strict=True):
            for j, score in zip(found, values, strict=True):
                if j >= 0:
                    rows.append((f"00{user}", f"00{item}", f"00{j}", float(score), "llm", AWKWARD))
        return dict(zip(("user", "item", "negative", "score", "source", "text"), zip(*rows, strict=True), strict=True))
    for user, story in enumerate(view.stories(range(view.prep.n_users))["users"]):
        for rank, item in enumerate(story["lists"]["dns"], 1):
            rows.append((f"00{user}", f"00{item}", rank))
    return dict(zip(("user", "item", "rank"), zip(*rows, strict=True), strict=True))


def read(path, kind: str) -> dict[str, list]:
    """What another program reads."""
    if kind == "npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name].tolist() for name in file.files}
    if kind == "parquet":
        return pl.read_parquet(path).to_dict(as_series=False)
    if kind == "jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: [row[name] for row in rows] for name in rows[0]}
    with path.open(encoding="utf-8", newline="") as file:
        names, *rows = list(csv.reader(file, delimiter="\t" if kind == "recbole" else ","))
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


RECBOLE = {"user": "user_id:token", "item": "item_id:token", "negative": "neg_item_id:token", "score": "score:float",
           "source": "source:token", "text": "text:token_seq", "rank": "rank:float"}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("what", ["negatives", "recommendations"])
def test_what_is_written_loads_back_equal(run, tmp_path, what, kind):
    method = None if what == "negatives" else "dns"
    (path,) = export(run, what, kind, tmp_path, method)
    assert path.name == (f"{what}.inter" if kind == "recbole" else f"{what}.{kind}")
    found = read(path, kind)
    for name, values in expected(run, what).items():
        back = found[RECBOLE[name] if kind == "recbole" else name]
        if name in ("score", "rank"):
            np.testing.assert_array_equal(np.array(back, np.float32), np.array(values, np.float32))
        else:
            assert back == list(values)


@pytest.mark.parametrize("kind", WRITERS)
def test_embeddings_load_back_equal_beside_their_keys(run, tmp_path, kind):
    names = {"user": ("uid:token", "user_emb:float_seq"), "item": ("iid:token", "item_emb:float_seq")}
    for side, path in zip(("user", "item"), export(run, "embeddings", kind, tmp_path, "hnlm"), strict=True):
        key, vector = names[side] if kind == "recbole" else (f"{side}_key", f"{side}_vector")
        assert path.name == (f"embeddings.{side}emb" if kind == "recbole" else f"{side}_embeddings.{kind}")
        found, table = read(path, kind), load_npy(run / "train" / "hnlm" / "seed0" / f"{side}.npy")
        back = [np.array(v.split() if isinstance(v, str) else v, np.float32) for v in found[vector]]
        np.testing.assert_array_equal(back, table)
        assert kind != "npz" or np.load(path)[vector].dtype == np.float32
        assert found[key] == [f"00{n}" for n in range(len(table))]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has a disk that is always full")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence(run, tmp_path, kind):
    name = f"negatives.{'inter' if kind == 'recbole' else kind}"
    (tmp_path / f".{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"^.*/{name}: .*No space left on device"):
        export(run, "negatives", kind, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_may_have_a_name_that_is_no_utf_8(run, tmp_path, kind):
    odd, plain = (export(run, "negatives", kind, tmp_path / os.fsdecode(name))[0] for name in (b"caf\xe9", b"cafe"))
    assert odd.read_bytes() == plain.read_bytes()


def test_two_negatives_a_positive_by_hand_and_a_user_with_none_left(tmp_path, monkeypatch):
    """User 0 took items 0 and 1, user 1 all three: only user 0 has negatives, two for each positive."""
    monkeypatch.setattr(module, "BLOCK", 3)
    items = [{"key": key, "title": key * 2} for key in "abc"]
    train = Csr.from_pairs([0, 0, 1, 1, 1], [0, 1, 0, 1, 2], 2, 3)
    prep = SimpleNamespace(users=[{"key": "u"}, {"key": "v"}], items=items, train=train)
    vectors = {
        "user": [[1, 2], [3, 4]],
        "item": [[1, 1], [2, 0], [5, 3]],
        "negatives": [[0, 2], [0, 2], [0, 2], [0, 1]],
    }
    for name, table in vectors.items():
        save_npy(tmp_path / f"{name}.npy", np.array(table))
    blocks = list(module._negatives(SimpleNamespace(prep=prep, generated={}), tmp_path))
    rows = [row for block in blocks for row in pl.DataFrame(block).rows()]
    assert rows == [("u", "a", "c", 11, "sampler", "cc")] * 2 + [
        ("u", "b", "c", 11, "sampler", "cc"),
        ("u", "b", "b", 2, "sampler", "bb"),
    ]
    assert [len(block["user"]) for block in blocks] == [3, 1]
    made = {"pairs": np.array([[1, 0], [0, 1]]), "matches": np.array([[2, 1], [-1, 0]]),
            "match_scores": np.array([[0.5, 0.25], [0, 1]]), "replies": [{"text": "X"}, {"text": "Y"}]}  # fmt: skip
    view = SimpleNamespace(prep=prep, generated=made, run=SimpleNamespace(has=lambda stage: True))
    (block,) = module._negatives(view, None)
    rows = pl.DataFrame(block).rows()
    assert rows[:2] == [("v", "a", "c", 0.5, "llm", "X"), ("v", "a", "b", 0.25, "llm", "X")]
    assert rows[2:] == [("u", "b", "a", 1, "llm", "Y")]
    monkeypatch.setattr(module, "BLOCK", 2)
    told = [(b["item_key"].to_list(), b["item_vector"].tolist()) for b in module._embeddings(view, tmp_path, "item")]
    assert told == [(["a", "b"], vectors["item"][:2]), (["c"], vectors["item"][2:])]


def test_without_a_folder_the_files_lie_in_the_run_s_own_and_are_written_anew(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for _ in range(2):
        (path,) = export(folder, "recommendations", "csv")
        assert path == folder / "export" / "recommendations" / "recommendations.csv"
        assert path.read_text(encoding="utf-8").splitlines()[0] == "user,item,rank,score"
        path.write_text("of before", encoding="utf-8")


def test_a_run_without_generated_negatives_is_told_to_name_a_method(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("generate"))
    manifest = load_json(folder / "eval" / "manifest.json")
    del manifest["inputs"]["generate"]
    save_json(folder / "eval" / "manifest.json", manifest)
    with pytest.raises(UserError, match="run holds no generated negatives; name a --method for those of its sampler"):
        export(folder, "negatives", "csv", tmp_path / "out")


def test_a_sampler_s_negatives_are_its_own_and_never_training_items(run, tmp_path):
    (path,) = export(run, "negatives", "parquet", tmp_path, "dns")
    found, prep = pl.read_parquet(path), Run(run).prep()
    drawn = load_npy(run / "train" / "dns" / "seed0" / "negatives.npy")
    assert found["negative"].to_list() == [f"00{item}" for item in drawn[:, 1]]
    assert found["source"].unique().to_list() == ["sampler"]
    assert found.select("user", "item").rows() == [(f"00{u}", f"00{i}") for u, i in prep.train.pairs()]
    train = {(f"00{u}", f"00{i}") for u, i in prep.train.pairs()}
    assert not train & set(found.select("user", "negative").rows())


def test_recommendations_of_many_users_stream_to_disk(tmp_path):
    """40,000 users x 20 recommendations are 800,000 rows, over 100 MB as Python values; writing them may cost 50 MB."""
    n_users, n_items, run = 40_000, 50, tmp_path / "run"
    for stage in ("prep", "eval", "train/mf/seed0"):
        (run / stage).mkdir(parents=True)
        counts = {"users": n_users, "items": n_items}
        manifest = {"counts": counts, "timing": {}, "knobs": {}, "fingerprint": stage, "inputs": {}}
        save_json(run / stage / "manifest.json", manifest)
    save_json(run / "eval" / "metrics.json", {"k": [20], "methods": {"mf": {"seed0": {}}}})
    save_jsonl(run / "prep" / "users.jsonl", ({"user": n, "key": f"u{n}"} for n in range(n_users)))
    save_jsonl(run / "prep" / "items.jsonl", ({"item": n, "key": f"i{n}", "title": ""} for n in range(n_items)))
    none = Csr.from_pairs(np.array([], int), np.array([], int), n_users, n_items)
    for part in ("train", "valid", "test"):
        save_csr(run / "prep", part, none)
    save_npy(run / "prep" / "train.order.npy", np.zeros(0, np.int32))
    rng = np.random.default_rng(0)
    for side, n in (("user", n_users), ("item", n_items)):
        save_npy(run / "train" / "mf" / "seed0" / f"{side}.npy", rng.normal(size=(n, 4)).astype(np.float32))
    extra = run_measured(f"""
from hnlm_ref.export import export, _recommendations
from hnlm_ref.view import View
for kind in ("csv", "parquet"):
    path = pathlib.Path({str(run)!r})
    next(_recommendations(View(path), path / "train/mf/seed0"))  # the users are read: what comes on top is counted
    before = peak()
    (out,) = export(path, "recommendations", kind, pathlib.Path({str(tmp_path)!r}))
    print(peak() - before)
""")
    assert max(extra) < 50e6
    for table in (pl.scan_parquet(tmp_path / "recommendations.parquet"), pl.scan_csv(tmp_path / "recommendations.csv")):
        assert table.select(pl.len()).collect().item() == 800_000


def test_generated_negatives_serve_in_the_readme_s_pytorch_loop(run, tmp_path, monkeypatch):
    export(run, "negatives", "npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    made = {"np": np, "torch": torch}
    exec(readme_code("data = np.load("), made)
    user, item = (made[f"{side}_table"].weight.detach().numpy() for side in ("user", "item"))
    rows = expected(run, "negatives")
    u = user[np.searchsorted(made["users"], rows["user"])]
    i, j = (item[np.searchsorted(made["items"], rows[name])] for name in ("item", "negative"))
    assert np.log1p(np.exp((u * (j - i)).sum(1))).mean() < 0.5  # log 2 is chance


def test_generated_negatives_serve_in_the_readme_s_recbole_loop(run, tmp_path):
    """RecBole's BPR takes neg_item_id from the file in place of a sampler's; five epochs of the example's one."""
    python = os.environ.get("HNLM_RECBOLE_PYTHON")
    if python is None:
        pytest.skip("RecBole 1.2.1 needs numpy < 2: set HNLM_RECBOLE_PYTHON to the python of an environment with it")
    (tmp_path / "RUN").symlink_to(run)
    export(tmp_path / "RUN", "negatives", "recbole")
    code = f"""
import itertools, torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender import BPR
{readme_code("settings = {").replace("in train:", "in itertools.chain(*[train] * 5):")}    print(loss.item())
keys = [train.dataset.id2token(name.removeprefix("neg_"), batch[name]) for name in settings["load_col"]["inter"]]
print(*zip(*keys), sep="\\n")
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    losses = [float(line) for line in lines if line.startswith("0.")]
    assert losses[-1] < 0.3 < losses[0] < 0.75
    rows = expected(run, "negatives")
    known = set(zip(rows["user"], rows["item"], rows["negative"], strict=True))
    seen = [ast.literal_eval(line) for line in lines if line.startswith("('")]
    assert len(seen) > 100 and known.issuperset(seen)
