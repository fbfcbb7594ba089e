"""Stage 4 as a user runs it, on a made-up preparation: every method, repeatable, resumable, and exact at alpha 0."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hnlm_ref.artifacts import Csr, load_csr, load_json, load_jsonl, load_npy, save_csr, save_json, save_jsonl, save_npy
from hnlm_ref.cli import load_stage, stage_file
from hnlm_ref.console import UserError

N_USERS, N_ITEMS, D_LLM = 40, 30, 16


@pytest.fixture
def run_dir(tmp_path):
    """A finished prep, sft and generate (for half of the pairs), made from random numbers."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(N_ITEMS)[:8] for _ in range(N_USERS)])
    train = Csr.from_pairs(np.repeat(np.arange(N_USERS), 6), rows[:, :6].ravel(), N_USERS, N_ITEMS)
    valid = Csr.from_pairs(np.repeat(np.arange(N_USERS), 2), rows[:, 6:].ravel(), N_USERS, N_ITEMS)
    write_prep(tmp_path, train, valid)
    pairs = train.pairs()[::2]
    for stage, arrays in {
        "sft": {
            "user_text": rng.standard_normal((N_USERS, D_LLM)).astype(np.float32),
            "item_text": rng.standard_normal((N_ITEMS, D_LLM)).astype(np.float32),
            "cf_user": rng.standard_normal((N_USERS, 8)).astype(np.float32),
            "cf_item": rng.standard_normal((N_ITEMS, 8)).astype(np.float32),
        },
        "generate": {
            "pairs": pairs,
            "embeddings": rng.standard_normal((len(pairs), D_LLM)).astype(np.float16),
            "matches": rng.integers(0, N_ITEMS, (len(pairs), 4)).astype(np.int32),
            "match_scores": np.sort(rng.random((len(pairs), 4), np.float32))[:, ::-1].copy(),
        },
    }.items():
        (tmp_path / stage).mkdir()
        for name, array in arrays.items():
            save_npy(tmp_path / stage / f"{name}.npy", array)
        save_json(tmp_path / stage / "manifest.json", {"fingerprint": stage, "inputs": {"prep": "p"}, "counts": {}})
    return tmp_path


def write_prep(folder, train, valid):
    prep = folder / "prep"
    prep.mkdir()
    for part, csr in (("train", train), ("valid", valid)):
        save_csr(prep, part, csr)
    save_npy(prep / "train.order.npy", np.arange(train.nnz, dtype=np.int32))
    save_jsonl(prep / "users.jsonl", [{"user": u, "key": f"u{u}", "profile": ""} for u in range(train.n_rows)])
    save_jsonl(
        prep / "items.jsonl",
        [{"item": i, "key": f"i{i}", "title": f"Title {i}", "text": "", "profile": ""} for i in range(train.n_cols)],
    )
    counts = {"users": train.n_rows, "items": train.n_cols, "train": train.nnz, "valid": valid.nnz, "test": 0}
    save_json(prep / "manifest.json", {"fingerprint": "p", "inputs": {}, "counts": counts})


def train(run_dir, method, *words, seed=0):
    """Run the stage; gives its folder."""
    preset = run_dir / "test.toml"
    preset.write_text(
        "[train]\nn_epochs = 3\nbatch_size = 64\ndim = 8\nadapter_hidden = 8\ncheckpoint_every = 1\n", encoding="utf-8"
    )
    common = ["--preset", str(preset), "--run-dir", str(run_dir), "--device", "cpu"]
    load_stage("train").main([*common, "--method", method, "--seed", str(seed), *words], standalone_mode=False)
    return run_dir / "train" / method / f"seed{seed}"


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


METHODS = [
    *((name, []) for name in ("uniform", "popularity", "dns", "dns_mn", "mixgcf", "ahns")),
    *((name, []) for name in ("hnlm", "hnlm_matched", "hnlm_pool")),
    *(("mine", ["--sampler", "dns", "--enhancer", name]) for name in ("rlmrec_con", "rlmrec_gen", "kar")),
    ("dns", ["--backbone", "mf", "--guard-threshold", "1"]),
    ("hnlm", ["--adapter-grad", "joint", "--adapter", "attention", "--warm-start"]),
    ("hnlm", ["--rank-loss", "hinge", "--n-negatives", "3", "--base-sampler", "dns", "--n-ramp-epochs", "2"]),
    ("hnlm", ["--adapter-grad", "joint", "--adapter", "attention", "--guard-threshold", "1", "--warm-start"]),
    ("mixgcf", ["--backbone", "mf", "--n-negatives", "2", "--batch-size", "239"]),  # 240 pairs: a batch of one row
]


@pytest.mark.parametrize(
    ("method", "words"), METHODS, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_every_method_trains_and_writes_what_stage_5_reads(run_dir, method, words):
    folder = train(run_dir, method, *words)
    user, item, negatives = (load_npy(folder / f"{name}.npy") for name in ("user", "item", "negatives"))
    log = load_jsonl(folder / "log.jsonl")
    assert (user.shape, item.shape, user.dtype, item.dtype) == ((N_USERS, 8), (N_ITEMS, 8), np.float32, np.float32)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert all(np.isfinite(list(line.values())).all() for line in log)
    known = set(map(tuple, load_csr(run_dir / "prep", "train", N_ITEMS).pairs().tolist()))
    assert set(negatives[:, 0]) == set(range(N_USERS))
    assert known.isdisjoint(map(tuple, negatives.tolist()))
    assert sorted(p.name for p in folder.iterdir()) == [
        "item.npy", "log.jsonl", "manifest.json", "model.safetensors", "negatives.npy", "user.npy",
    ]  # fmt: skip
    read = {"prep", *["sft"] * any(word in words for word in ("--enhancer", "--guard-threshold", "--warm-start"))}
    assert set(load_json(folder / "manifest.json")["inputs"]) == read | ({"generate"} if "hnlm" in method else set())


@pytest.mark.parametrize("base", ["uniform", "dns", "mixgcf"])
def test_alpha_0_repeats_the_base_samplers_run_exactly(run_dir, base):  # case E06
    plain = files(train(run_dir, base))
    assert files(train(run_dir, "hnlm", "--base-sampler", base, "--mix-alpha", "0")) == plain
    assert files(train(run_dir, "hnlm", "--base-sampler", base, "--mix-alpha", "0.5"))["user.npy"] != plain["user.npy"]


def test_the_log_tells_how_large_both_parts_of_the_mixture_are(run_dir):  # case E06
    first, second = (load_jsonl(train(run_dir, "hnlm", "--mix-alpha", a) / "log.jsonl")[0] for a in ("0.001", "0.5"))
    assert first["norm_hard"] < 0.01 * first["norm_sampled"]
    assert second["norm_hard"] > 0.01 * second["norm_sampled"]


@pytest.mark.parametrize("adapter_grad", ["joint", "anchored"])
def test_the_adapter_learns(run_dir, adapter_grad):  # case E01
    from safetensors.numpy import load_file

    words = "--adapter-grad", adapter_grad, "--n-epochs"
    one, two = (
        load_file(train(run_dir, "hnlm", *words, str(n), "--patience", "9") / "model.safetensors") for n in (1, 3)
    )
    names = [name for name in one if name.startswith("adapter.mlp")]
    assert len(names) == 4
    assert any((one[name] != two[name]).any() for name in names)


def test_a_seed_repeats_and_another_differs(run_dir):  # case E07
    first = files(train(run_dir, "hnlm_pool"))
    assert files(train(run_dir, "hnlm_pool", "--n-threads", "1", "--patience", "99")) == first
    assert files(train(run_dir, "hnlm_pool", seed=1))["user.npy"] != first["user.npy"]


def test_killed_and_started_again_gives_the_same_bytes(run_dir):
    words = ["--n-epochs", "100", "--patience", "100", "--n-threads", "1"]
    undisturbed = train(run_dir, "hnlm", *words)
    expected = files(undisturbed)
    command = [sys.executable, str(stage_file("train")), "--preset", str(run_dir / "test.toml"), "--device", "cpu"]
    command += ["--run-dir", str(run_dir), "--method", "hnlm", *words]
    shutil.rmtree(undisturbed)
    process = subprocess.Popen(command)
    checkpoint = run_dir / "train" / "hnlm" / ".seed0.partial" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stderr
    assert files(undisturbed) == expected


@pytest.mark.parametrize("words", [("--guard-threshold", "1"), ("--enhancer", "kar")])
def test_texts_that_are_all_alike_are_no_ground_to_go_by(run_dir, words):
    items = load_jsonl(run_dir / "prep" / "items.jsonl")
    save_jsonl(run_dir / "prep" / "items.jsonl", ({**item, "title": ""} for item in items))
    with pytest.raises(
        UserError, match="guard_threshold and enhancers need texts; every item is 'an item without title'"
    ):
        train(run_dir, "dns", *words)


def test_a_user_who_took_everything_is_named_and_skipped(tmp_path, capsys):  # case B01
    rows, items = np.array([0] * 5 + [1]), np.array([0, 1, 2, 3, 4, 0])
    write_prep(tmp_path, Csr.from_pairs(rows, items, 2, 5), Csr.from_pairs([1], [1], 2, 5))
    folder = train(tmp_path, "uniform")
    assert "1 users have no item left as a negative" in (told := capsys.readouterr().err)
    assert "'u0' (5 of 5 items seen)" in told and "short of" not in told
    assert set(load_npy(folder / "negatives.npy")[:, 0]) == {1}
    assert load_json(folder / "manifest.json")["counts"]["pairs skipped, no negative left"] == 5


def test_users_who_all_took_everything_leave_nothing_to_train_on(tmp_path):
    everything = Csr.from_pairs(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 2, 2)
    write_prep(tmp_path, everything, Csr.from_pairs([0], [0], 2, 2))
    with pytest.raises(
        UserError, match=r"nothing to train on: user 'u0' \(2 of 2 items seen\), and so has every other"
    ):
        train(tmp_path, "uniform")


def test_users_short_of_candidates_are_counted(tmp_path, capsys):  # case B11: 3 free items, a pool of 50
    rows, items = np.array([0] * 57 + [1] * 10 + [2] * 20), np.array([*range(57), *range(10), *range(20)])
    write_prep(tmp_path, Csr.from_pairs(rows, items, 3, 60), Csr.from_pairs([1], [50], 3, 60))
    train(tmp_path, "dns", "--pool-size", "50")
    assert "2 users are short of 50 candidates, by 47 at most" in capsys.readouterr().err


def test_negatives_of_another_preparation_are_refused(run_dir, capsys):  # cases A22, E13
    manifest = {"fingerprint": "g", "inputs": {"prep": "other"}, "counts": {}}
    save_json(run_dir / "generate" / "manifest.json", manifest)
    with pytest.raises(UserError, match="was made from prep other"):
        train(run_dir, "hnlm")
    with pytest.raises(UserError, match=r"generate_dir .*elsewhere is no finished generate folder"):
        train(run_dir, "hnlm", "--generate-dir", str(run_dir / "elsewhere"))
    (run_dir / "generate").rename(run_dir / "elsewhere")
    with pytest.raises(UserError, match="made from prep other, this run's prep is p"):
        train(run_dir, "hnlm", "--generate-dir", str(run_dir / "elsewhere"))
    save_json(run_dir / "elsewhere" / "manifest.json", {**manifest, "inputs": {"prep": "p"}})
    assert train(run_dir, "hnlm_matched", "--generate-dir", str(run_dir / "elsewhere")).is_dir()
    assert "will be replaced" not in capsys.readouterr().err
    save_json(run_dir / "elsewhere" / "manifest.json", {**manifest, "inputs": {"prep": "p"}, "fingerprint": "h"})
    train(run_dir, "hnlm_matched", "--generate-dir", str(run_dir / "elsewhere"))
    assert "made with other knobs, inputs or code; it will be replaced" in capsys.readouterr().err


def test_too_few_generated_pairs_are_refused_unless_allowed(run_dir):  # case E12
    with pytest.raises(UserError, match=r"only 50\.0% of the training pairs"):
        train(run_dir, "hnlm", "--min-coverage", "0.6")
    folder = train(run_dir, "hnlm", "--min-coverage", "0.4")
    assert load_json(folder / "manifest.json")["counts"]["pairs with a generated negative"] == 120


def test_no_negatives_at_all_are_refused(run_dir):  # case B17
    for word in ("--n-negatives", "--n-matched", "--pool-size"):
        with pytest.raises(UserError, match="at least 1 is wanted"):
            train(run_dir, "hnlm_pool", word, "0")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(run_dir, cli):  # case E10
    words = "train", "--run-dir", run_dir, "--n-epochs", "1", "--dim", "8"
    assert cli(*words, CUDA_VISIBLE_DEVICES="").returncode == 0
    assert load_json(run_dir / "train" / "uniform" / "seed0" / "manifest.json")["device"] == "cpu"
    wrong = cli(*words, "--device", "cuda", "--seed", "1", CUDA_VISIBLE_DEVICES="")
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].endswith("torch finds no CUDA device here; use --device cpu or auto")
    assert "Traceback" not in wrong.stderr


def test_evaluation_has_the_same_bytes_for_any_number_of_threads(toy_run, tmp_path):  # case E08
    shutil.copytree(toy_run, tmp_path / "run")
    prints = set()
    for n_threads in (1, 2, 8):
        shutil.rmtree(tmp_path / "run" / "eval")
        words = "--preset", "toy", "--run-dir", str(tmp_path / "run"), "--n-threads", str(n_threads)
        load_stage("eval").main(words, standalone_mode=False)
        prints.add(load_json(tmp_path / "run" / "eval" / "manifest.json")["fingerprint"])
    assert len(prints) == 1


@pytest.mark.parametrize(("vary", "seen"), [(True, {1}), (False, {2})])
def test_dense_products_have_one_thread_where_they_depend_on_them(run_dir, monkeypatch, vary, seen):
    import torch

    from hnlm_ref import losses, recommender

    found, before = set(), torch.get_num_threads()

    class Own(recommender.Encoder):
        def extra_loss(self, batch, layers):
            found.add(torch.get_num_threads())
            return losses.info_nce(layers[0], layers[0], 0.2)

    monkeypatch.setitem(recommender.ENCODERS, "mf", Own)
    monkeypatch.setattr(losses, "products_vary", lambda: vary)
    try:
        for words in (["hnlm"], ["uniform", "--enhancer", "kar"], ["uniform", "--backbone", "mf"]):
            train(run_dir, *words, "--n-epochs", "1", "--n-threads", "2")
            found.add(torch.get_num_threads())
        train(run_dir, "hnlm", "--mix-alpha", "0", "--n-epochs", "1", "--n-threads", "2")
        assert torch.get_num_threads() == 2  # plain LightGCN has none
    finally:
        torch.set_num_threads(before)
    assert found == seen


def test_a_warm_start_of_another_dimension_is_refused(run_dir):
    with pytest.raises(UserError, match="vectors of 8 numbers, dim is 4"):
        train(run_dir, "uniform", "--warm-start", "--dim", "4")


@pytest.mark.parametrize("adapter_grad", ["joint", "anchored"])
def test_the_terms_of_a_loss_are_those_of_a_loop_over_its_rows(run_dir, adapter_grad):  # cases E03, E04, E06
    """One batch holds all, and nothing moves at a rate of 0: the vectors written are those the loss was taken of."""
    from safetensors.numpy import load_file

    from hnlm_ref.samplers import Sampler
    from hnlm_ref.training import epoch_seed

    words = "--lr 0 --n-epochs 1 --batch-size 999 --backbone mf --n-negatives 2 --mix-alpha 0.6 --n-ramp-epochs 1"
    words += " --rank-loss hinge --hinge-margin 0.7 --lambda-cl 3 --cl-temperature 0.5 --lambda-reg 5"
    words += " --warm-start --base-sampler dns --pool-size 3"
    folder = train(run_dir, "hnlm", *words.split(), "--adapter-grad", adapter_grad)
    user, item, model = (
        load_npy(folder / "user.npy"),
        load_npy(folder / "item.npy"),
        load_file(folder / "model.safetensors"),
    )
    h, matches = (load_npy(run_dir / "generate" / f"{name}.npy") for name in ("embeddings", "matches"))
    h, known = h.astype(np.float64), load_csr(run_dir / "prep", "train", N_ITEMS)
    layers = [[model[f"adapter.mlp.{n}.{part}"] for part in ("weight", "bias")] for n in (0, 2)]
    length = np.mean([np.sqrt(vector @ vector) for vector in item])
    assert (user == load_npy(run_dir / "sft" / "cf_user.npy")).all()
    assert (item == load_npy(run_dir / "sft" / "cf_item.npy")).all()
    drawn = Sampler("dns", known, n_negatives=2, pool_size=3).draw(
        np.repeat(np.arange(N_USERS, dtype=np.int32), 6), epoch_seed(0, 1)
    )

    def cosine(a, b):
        return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)

    found = {name: [] for name in ("rank", "cl", "anchor", "norm_hard", "norm_sampled", "l2")}
    for row, (u, i) in enumerate(known.pairs()):
        negatives = [item[max(pool, key=lambda j: user[u] @ item[j])] for pool in drawn[row].tolist()]
        found["l2"].append(sum(v @ v for v in (user[u], item[i], *negatives)) / 2)
        if row % 2 == 0:  # every other pair has a generated vector
            hidden = layers[0][0] @ ((h[row // 2] - h.mean(0)) / h.std(0)) + layers[0][1]
            hard = layers[1][0] @ np.where(hidden > 0, hidden, 0.01 * hidden) + layers[1][1]
            hard *= length / np.sqrt(hard @ hard)
            nearest = matches[row // 2, 0]
            if nearest not in known.row(u):
                found["anchor"].append(((hard - item[nearest]) ** 2).sum() / 2)
            found["cl"].append(np.log1p(np.exp((cosine(user[u], hard) - cosine(user[u], item[i])) / 0.5)))
            found["norm_hard"].append(0.3 * np.sqrt(hard @ hard))  # in the first of two epochs alpha is half of 0.6
            found["norm_sampled"] += [0.7 * np.sqrt(v @ v) for v in negatives]
            negatives = [0.3 * hard + 0.7 * v for v in negatives]
        found["rank"] += [max(0, 0.7 - user[u] @ item[i] + user[u] @ v) for v in negatives]
    means = {name: np.mean(values) for name, values in found.items()}
    if adapter_grad == "joint":
        del means["anchor"]
    means["loss"] = means["rank"] + 3 * means["cl"] + 5 * means["l2"] + means.get("anchor", 0)
    (line,) = load_jsonl(folder / "log.jsonl")
    assert {name: line[name] for name in means} == pytest.approx(means, rel=1e-4)
    assert line["extra"] == 0 and ("anchor" in line) == (adapter_grad == "anchored")


def test_an_anchored_adapter_is_moved_by_its_anchor_alone_which_moves_nothing_else(run_dir):
    """One step. At so low a margin the hinge is 0 for all rows, so that with lambda_cl 0 only the anchor is left."""
    from safetensors.numpy import load_file

    words = "--n-epochs 1 --batch-size 999 --rank-loss hinge --hinge-margin -99 --lambda-reg 0 --adapter-grad anchored"
    made = [
        load_file(train(run_dir, "hnlm", *words.split(), "--lr", lr, "--lambda-cl", cl) / "model.safetensors")
        for lr, cl in (("0", "0"), ("0.1", "0"), ("0.1", "3"))
    ]
    still, anchored, pushed = ({name: array.tolist() for name, array in model.items()} for model in made)
    assert {name for name in still if still[name] != anchored[name]} == {name for name in still if ".mlp." in name}
    assert {name for name in still if anchored[name] != pushed[name]} == {"encoder.table"}


def test_a_training_is_validated_and_ended_as_its_knobs_say(run_dir):
    """At a rate of 0 no validation is better than the first, at epoch 2: the two after it are at 4 and 6."""
    words = "--lr 0 --eval-every 2 --patience 2 --n-epochs 9"
    folder = train(run_dir, "uniform", *words.split())
    log = load_jsonl(folder / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log if "valid_ndcg@20" in line] == [2, 4, 6]


def test_an_enhancer_is_told_the_texts_of_users_and_of_items(run_dir):
    """One batch at a rate of 0, with all users and items in it: the InfoNCE of each side by a loop."""
    from safetensors.numpy import load_file

    words = "--sampler uniform --enhancer rlmrec_con --backbone mf --lr 0 --n-epochs 1 --batch-size 999"
    folder = train(run_dir, "mine", *words.split(), "--lambda-extra", "3", "--lambda-reg", "0")
    model, (line,) = load_file(folder / "model.safetensors"), load_jsonl(folder / "log.jsonl")
    texts = [load_npy(run_dir / "sft" / f"{side}_text.npy").astype(float) for side in ("user", "item")]
    both, (first, second) = np.concatenate(texts), [f"encoder.enhancer.project.{n}." for n in (0, 2)]
    expected = 0
    for side, text in zip(("user", "item"), texts, strict=True):
        hidden = (text - both.mean(0)) / both.std(0) @ model[first + "weight"].T + model[first + "bias"]
        told = np.where(hidden > 0, hidden, 0.01 * hidden) @ model[second + "weight"].T + model[second + "bias"]
        mine = load_npy(folder / f"{side}.npy").astype(float)
        cosines = [[a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) / 0.2 for b in told] for a in mine]
        expected += np.mean([np.log(np.exp(row).sum()) - row[n] for n, row in enumerate(cosines)])
    assert line["extra"] == pytest.approx(expected, rel=1e-4)
    assert line["loss"] == pytest.approx(line["rank"] + 3 * line["extra"], rel=1e-5)


def test_the_guard_refuses_matched_items_as_well(run_dir):
    from hnlm_ref.samplers import semantic_guard

    known = load_csr(run_dir / "prep", "train", N_ITEMS)
    blocked = semantic_guard(load_npy(run_dir / "sft" / "item_text.npy"), known, -0.5)
    left = [
        any(item not in known.row(user) and item not in blocked.row(user) for item in row)
        for user, row in zip(known.pairs()[::2, 0], load_npy(run_dir / "generate" / "matches.npy"), strict=True)
    ]
    folder = train(run_dir, "hnlm_matched", "--guard-threshold", "-0.5", "--min-coverage", "0")
    manifest = load_json(folder / "manifest.json")
    assert manifest["counts"]["pairs with a generated negative"] == sum(left) < 100
    assert list(manifest["inputs"]) == ["prep", "sft", "generate"]


def test_negatives_that_the_guard_refuses_for_want_of_others_are_counted(run_dir):
    from hnlm_ref.samplers import semantic_guard

    known, text = load_csr(run_dir / "prep", "train", N_ITEMS), load_npy(run_dir / "sft" / "item_text.npy")
    counted = []
    for threshold in ("-9", "-1.5", "9"):  # refuses all that was not taken, most, nothing
        blocked = semantic_guard(text, known, float(threshold))
        folder = train(run_dir, "uniform", "--guard-threshold", threshold, "--n-negatives", "2")
        negatives = load_npy(folder / "negatives.npy").tolist()
        counts = load_json(folder / "manifest.json")["counts"]
        counted.append(counts["negatives that the guard refuses, for want of others"])
        assert counted[-1] == sum(item in blocked.row(user) for user, item in negatives)
    assert len(negatives) == counted[0] > counted[1] > counted[2] == 0
