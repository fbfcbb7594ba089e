"""Stage 2: triplets are what they say, losses are their equations, a killed tuning ends like an undisturbed one."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hnlm_ref import artifacts, llm, losses, training
from hnlm_ref.artifacts import Csr, Prep, Run, load_json, load_jsonl, load_npy, save_json, save_jsonl
from hnlm_ref.cli import load_stage, stage_file
from hnlm_ref.console import UserError
from hnlm_ref.negatives import choose_pairs, mine_triplets, quality, with_best_ranked
from hnlm_ref.samplers import semantic_guard


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_sft_loss_is_the_mean_over_allowed_columns():
    angle = {"out": [0.0, 0.5, 1.0, 2.0], "positive": [0.1, 2.0, 0.7, 1.0], "negative": [1.5, 0.2, 3.0, 0.4]}
    vectors = {name: torch.tensor([[math.cos(a), math.sin(a)] for a in some]) for name, some in angle.items()}
    users, items = [0, 0, 1, 2], [5, 6, 5, 7]
    allowed = [  # all but same user (0, 1) and same item (0, 2); the own column stays
        (0, 0), (0, 3), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3),
    ]  # fmt: skip
    gaps = [
        math.cos(angle["out"][b] - angle["negative"][c]) - math.cos(angle["out"][b] - angle["positive"][b])
        for b, c in allowed
    ]
    expected = sum(softplus(gap / 0.5) for gap in gaps) / len(gaps)
    lengths = {name: x * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None] for name, x in vectors.items()}
    loss = losses.sft_loss(*lengths.values(), torch.tensor(users), torch.tensor(items), 0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    own = [softplus(gap / 0.5) for (b, c), gap in zip(allowed, gaps, strict=True) if b == c]
    assert losses.contrast_loss(*vectors.values(), 0.5).item() == pytest.approx(sum(own) / 4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opposite_cosines_give_forty_and_stay_finite(dtype):
    h = torch.tensor([[1.0, 0.0]], dtype=dtype)
    one = torch.tensor([0])
    loss = losses.sft_loss(h, -h, h, one, one, 0.05)  # case D13
    assert loss.item() == pytest.approx(40.0, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert losses.contrast_loss(h, -h, h, 0.05).isfinite()


def test_the_catalogue_loss_is_the_softmax_over_all_items():
    out, targets = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    total = math.exp(1 / 0.5) + math.exp(0) + math.exp(-1 / 0.5)
    expected = -math.log(math.exp(0) / total)
    assert losses.info_nce(out, targets, 0.5, torch.tensor([1])).item() == pytest.approx(expected, abs=1e-6)


def prep_of(train: Csr, valid: Csr | None = None) -> Prep:
    users, items = ([{} for _ in range(n)] for n in (train.n_rows, train.n_cols))
    return Prep(users, items, train, valid or Csr.from_pairs([], [], train.n_rows, train.n_cols), np.arange(train.nnz))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.integers(0, 2**31),
    st.sampled_from([(0, 2), (1, 3), (5, 50), None]),
)
def test_mined_items_are_free_and_of_the_asked_ranks(n_items, seed, window):
    rng = np.random.default_rng(seed)
    taken = rng.random((3, n_items)) < 0.5
    train = Csr.from_pairs(*np.nonzero(taken), 3, n_items)
    cf = rng.normal(size=(3, 4)), rng.normal(size=(n_items, 4))
    mined = mine_triplets(prep_of(train), cf, train, [2, 0, 1], 3, 2, window, 2, rng)
    assert list(mined) == [u for u in (2, 0, 1) if 0 < taken[u].sum() < n_items]
    for u, pairs in mined.items():
        assert pairs.shape == (min(3, taken[u].sum()), 3)
        assert taken[u][pairs[:, 0]].all() and not taken[u][pairs[:, 1:]].any()
        if window:
            ranked = sorted(np.flatnonzero(~taken[u]), key=lambda j: -cf[1][j] @ cf[0][u])
            assert set(pairs[:, 1:].flatten()) <= set(ranked[window[0] : window[1]] or ranked[-1:])


def test_of_equally_scored_items_those_of_lower_number_have_the_better_ranks():
    train = Csr.from_pairs([0], [1], 1, 7)
    cf = np.ones((1, 1)), np.array([[1.0], [9.0], [2.0], [1.0], [1.0], [2.0], [0.0]])  # ranked 2, 5, 0, 3, 4, 6
    for window, expected in (((0, 3), {2, 5, 0}), ((3, 4), {3}), ((4, 9), {4, 6}), ((8, 9), {6})):
        mined = mine_triplets(prep_of(train), cf, train, [0], 1, 64, window, 1, np.random.default_rng(0))
        assert set(mined[0][0, 1:].tolist()) == expected


def test_a_pool_as_large_as_the_catalogue_mines_the_best_free_item():
    train = Csr.from_pairs([0, 0], [0, 1], 1, 5)
    cf = np.ones((1, 1)), np.array([[9.0], [8.0], [1.0], [3.0], [2.0]])
    mined = mine_triplets(prep_of(train), cf, train, [0], 8, 1, None, 200, np.random.default_rng(0))
    assert mined[0][:, 1].tolist() == [3, 3]
    blocked = Csr.from_pairs([0, 0, 0], [0, 1, 3], 1, 5)  # a guard refuses item 3
    mined = mine_triplets(prep_of(train), cf, blocked, [0], 8, 1, None, 200, np.random.default_rng(0))
    assert mined[0][:, 1].tolist() == [4, 4]


def test_pairs_are_all_or_n_of_each_user_in_order():
    train = Csr.from_pairs([0, 0, 0, 2, 2], [4, 1, 3, 0, 2], 3, 5)
    assert choose_pairs(train, 0, seed=1).tolist() == [[0, 1], [0, 3], [0, 4], [2, 0], [2, 2]]
    for seed in range(5):
        chosen = choose_pairs(train, 2, seed)
        assert chosen[:, 0].tolist() == [0, 0, 2, 2] and chosen[2:].tolist() == [[2, 0], [2, 2]]
        assert chosen.tolist() == sorted(chosen.tolist()) and set(chosen[:2, 1]) < {1, 3, 4}
    assert len({tuple(choose_pairs(train, 2, seed)[:2, 1]) for seed in range(20)}) == 3  # any two of three
    full = Csr.from_pairs([0, 1, 1, 2], [1, 0, 1, 0], 3, 2)  # user 1 has no item left as a negative
    assert choose_pairs(full, 0, seed=1).tolist() == choose_pairs(full, 1, seed=1).tolist() == [[0, 1], [2, 0]]


def test_the_best_ranked_items_not_taken_join_the_items_taken():
    train = Csr.from_pairs([0, 1, 1, 1], [0, 1, 2, 3], 2, 4)
    cf = np.ones((2, 1), np.float32), np.array([[9], [1], [3], [2]], np.float32)  # ranked 0, 2, 3, 1
    assert with_best_ranked(train, cf, 0) is train
    found = with_best_ranked(train, cf, 2)
    assert [found.row(u).tolist() for u in range(2)] == [[0, 2, 3], [0, 1, 2, 3]]


def test_quality_figures_are_those_counted_by_hand():
    train, valid = Csr.from_pairs([0, 1], [0, 1], 2, 4), Csr.from_pairs([0], [3], 2, 4)
    cf = np.ones((2, 1)), np.array([[4.0], [3.0], [2.0], [1.0]])
    text = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    matches, users = np.array([[3, 1], [2, -1]]), np.array([0, 1])
    # user 0: free items 1, 2, 3 ranked so; user 1: 0, 2, 3. Matches (0, 3), (0, 1), (1, 2) have ranks 2, 0, 1 of 3.
    kinds = {"made": matches, "one": np.array([[-1], [0]])}  # the other is the best of user 1, and item 0
    found, one = quality(kinds, users, prep_of(train, valid), cf, text).values()
    assert found["warm_up_percentile"] == pytest.approx((0 + 1 + 1 / 2) / 3, abs=1e-5)
    assert found["false_rate"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["false_rate_chance"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3, abs=1e-5)
    assert found["false_rate_as_hard"] == 1 / 2 / 4  # one of two users has one, and the window holds all four ranks
    assert found["profile_similarity"] == pytest.approx((-1 + 0 + 0.5**0.5) / 3, abs=1e-5)
    assert found["popularity"] == pytest.approx((0 + 2 / 4 + 0) / 3, abs=1e-5)
    assert found["coverage"] == 0.75 and found["matched"] == 1.0
    assert found["most_used"] == pytest.approx(1 / 3, abs=1e-5)
    assert (one["warm_up_percentile"], one["popularity"], one["coverage"], one["matched"]) == (1, 2 / 4, 1 / 4, 1 / 2)


def test_as_hard_is_the_rate_of_the_21_ranks_around():
    """User u holds out item u; all rank the items alike, and one negative stands at every rank."""
    n = 50
    nobody, valid = Csr.from_pairs([], [], n, n), Csr.from_pairs(range(12), range(12), n, n)
    cf, text = (np.ones((n, 1)), -np.arange(n, dtype=float)[:, None]), (np.ones((n, 1)), np.ones((n, 1)))
    for rank in range(n):
        found = quality({"made": np.full((n, 1), rank)}, np.arange(n), prep_of(nobody, valid), cf, text)["made"]
        window = [place for place in range(rank - 10, rank + 11) if 0 <= place < n]
        expected = sum(place < 12 for place in window) / n / len(window)
        assert found["false_rate_as_hard"] == pytest.approx(expected, abs=1e-5)


def test_items_of_equal_vectors_are_ranked_by_number_however_many_threads_numpy_has():
    """A product by BLAS scores them differently from one column to the next."""
    n, n_users = 101, 37
    random, text = np.random.default_rng(0), (np.ones((n_users, 1)), np.ones((n, 1)))
    nobody = Csr.from_pairs([], [], n_users, n)
    cf = [random.normal(size=(rows, 64)).astype(np.float32) for rows in (n_users, 1)]
    cf[1] = np.repeat(cf[1], n, axis=0)
    kinds = {item: np.full((n_users, 1), item) for item in (0, 50, 100)}
    found = quality(kinds, np.arange(n_users), prep_of(nobody, nobody), cf, text)
    assert [figures["warm_up_percentile"] for figures in found.values()] == [1, 0.5, 0]


def test_quality_is_of_users_who_have_negatives_and_of_nothing_it_is_none():
    """Of more than a thousand users every second is looked at: of those asked about."""
    n = 1500
    nobody, valid = Csr.from_pairs([], [], n, 3), Csr.from_pairs([1], [0], n, 3)
    cf, text = (np.ones((n, 1)), np.array([[3.0], [2.0], [1.0]])), (np.ones((n, 1)), np.ones((3, 1)))
    kinds = {"made": np.array([[0], [1]]), "none": np.array([[-1], [-1]])}
    found, none = quality(kinds, np.array([1, 3]), prep_of(nobody, valid), cf, text).values()
    assert found["warm_up_percentile"] == (1 + 1 / 2) / 2 and set(none.values()) == {None}
    assert found["false_rate_as_hard"] == pytest.approx(1 / 2 / 3, abs=1e-5)  # one of the two asked about has one
    of_all = {"made": np.where(np.arange(n) % 2, -1, 0)[:, None]}  # of the users not looked at none has a match
    assert quality(of_all, np.arange(n), prep_of(nobody, valid), cf, text)["made"]["matched"] == 1


# ---- the stage ----------------------------------------------------------------------------------------------------


def start(stage, run, *words):
    """The stage in a process of its own, to be killed; with another number of threads than `run_stage`."""
    line = [sys.executable, stage_file(stage), "--preset", "toy", "--n-threads", 2, "--run-dir", run, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(list(map(str, line)), env=environment, stderr=subprocess.PIPE, text=True)


def run_stage(stage, run, *words):
    """The stage in this process; raises UserError as it would print it."""
    words = ["--preset", "toy", "--n-threads", "1", "--run-dir", run, *words]
    load_stage(stage).main(list(map(str, words)), standalone_mode=False)


def with_prep(toy_run, folder):
    shutil.copytree(toy_run / "prep", folder / "prep", ignore=shutil.ignore_patterns("test.*"))  # not opened: C13
    return folder


def hashes(folder):
    return load_json(folder / "manifest.json")["files"]


@pytest.fixture(scope="module")
def undisturbed(toy_run, tmp_path_factory):
    """Two epochs without a break, looking at every second step."""
    run = with_prep(toy_run, tmp_path_factory.mktemp("sft"))
    run_stage("sft", run, "--n-epochs", 2, "--eval-every", 2, "--patience", 99)
    return run


def test_a_killed_tuning_goes_on_to_the_same_bytes(undisturbed, toy_run, tmp_path, capsys):
    run = with_prep(toy_run, tmp_path)
    words = ("--n-epochs", 2, "--eval-every", 2, "--patience", 99)
    process = start("sft", run, *words)
    while not (run / ".sft.partial" / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "sft").exists()
    run_stage("sft", run, *words)
    assert "going on after step" in capsys.readouterr().err
    assert hashes(run / "sft") == hashes(undisturbed / "sft")  # case D11


def test_the_logged_tuning_lowers_the_loss_and_moves_every_added_weight(undisturbed):
    log = load_jsonl(undisturbed / "sft" / "log.jsonl")
    assert log[-1]["held_out_objective"] < log[1]["held_out_objective"] - 0.5  # line 1: ridge start
    assert [line["step"] for line in log] == [0, 0, *range(2, log[-1]["step"] + 1, 2)]
    for line in log:  # the default weights
        parts = [line[f"held_out_{name}"] for name in ("loss", "own_loss", "catalogue_loss")]
        assert line["held_out_objective"] == pytest.approx(parts[0] + 2.0 * parts[1] + 0.5 * parts[2], abs=1e-5)
    tensors = load_file(undisturbed / "sft" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 16  # A and B of four projections in two layers
    assert all(tensor.norm() > 0 for tensor in tensors.values())


def test_rates_rise_and_fall_gradients_are_clipped_and_the_last_step_is_looked_at(toy_run, tmp_path, monkeypatch):
    """Four steps with a warm-up of two: rates rise by thirds and fall by quarters, whichever is lower."""
    seen, made, plain, loss = [], [], torch.optim.AdamW.step, losses.sft_loss

    def step(optimiser):
        gradient = torch.cat([p.grad.flatten() for group in optimiser.param_groups for p in group["params"]])
        seen.append((*(group["lr"] for group in optimiser.param_groups), gradient.norm().item()))
        assert [group["weight_decay"] for group in optimiser.param_groups] == [0, 0]
        return plain(optimiser)

    def sft_loss(*args):
        assert args[-1] == 0.2
        value = loss(*args)
        made.extend([value.item()] if value.requires_grad else [])  # not when it looks at the held-out ones
        return value

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(losses, "sft_loss", sft_loss)
    run = with_prep(toy_run, tmp_path)
    words = ("--n-users", 16, "--warmup-steps", 2, "--lr", 0.6, "--lr-new", 1.2, "--eval-every", 3, "--patience", 9)
    run_stage("sft", run, *words, "--temperature", 0.2)  # the preset's batches are of four users
    of_lora, of_new, lengths = zip(*seen, strict=True)
    assert of_lora == pytest.approx([0.2, 0.4, 0.3, 0.15]) and of_new == pytest.approx([0.4, 0.8, 0.6, 0.3])
    assert max(lengths) == pytest.approx(1.0, abs=1e-4)
    log = load_jsonl(run / "sft" / "log.jsonl")
    assert [line["step"] for line in log] == [0, 0, 3, 4]
    assert [line["loss"] for line in log[2:]] == pytest.approx([sum(made[:3]) / 3, made[3]], abs=1e-6)


def test_tuning_ends_after_looks_without_a_better_one_and_keeps_the_best(toy_run, tmp_path, monkeypatch):
    """The held-out objective follows a script: at step 1 worse, at step 2 the best, then worse twice."""
    script, n_batches, weights, plain = [9, 5, 6, 4, 6, 7, 0, 0], 3, [], torch.optim.AdamW.step
    looked: list[int] = []

    def of_catalogue(out, *_):
        if out.requires_grad:
            return out.sum()
        looked.append(script[len(looked) // n_batches])
        return torch.tensor(1000.0 * looked[-1])

    def step(optimiser):
        plain(optimiser)
        weights.append([p.detach().clone() for p in optimiser.param_groups[0]["params"]])

    monkeypatch.setattr(losses, "info_nce", of_catalogue)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = with_prep(toy_run, tmp_path)
    run_stage("sft", run, "--eval-every", 1, "--patience", 2)
    assert [line["step"] for line in load_jsonl(run / "sft" / "log.jsonl")] == [0, 0, 1, 2, 3, 4]
    assert load_json(run / "sft" / "manifest.json")["counts"]["kept"]["step"] == 2
    saved = load_file(run / "sft" / "adapter" / "adapter_model.safetensors").values()
    assert all(any(torch.equal(tensor, weight) for weight in weights[1]) for tensor in saved)
    assert not all(any(torch.equal(tensor, weight) for weight in weights[3]) for tensor in saved)


def test_the_head_is_solved_for_the_hard_negatives_and_against_the_item_taken(toy_run, tmp_path, monkeypatch):
    given, solve, looked_at, warm_up = [], llm.Head.solve, [], training.warm_up

    def told(train, valid, **how):
        looked_at.extend(valid.pairs().tolist())
        return warm_up(train, valid, **how)

    monkeypatch.setattr(training, "warm_up", told)
    monkeypatch.setattr(llm.Head, "solve", lambda head, h, wanted: given.append(wanted) or solve(head, h, wanted))
    run = with_prep(toy_run, tmp_path)
    words = ("--n-epochs", 0, "--probe-users", 3, "--pairs-per-user", 4)
    run_stage("sft", run, *words, "--rank-from", 3, "--rank-to", 5)
    train, sft = Run(run).prep().train, run / "sft"
    assert looked_at == Run(run).prep().valid.pairs().tolist()
    cf_user, cf_item, targets = (load_npy(sft / f"{name}.npy") for name in ("cf_user", "cf_item", "targets"))
    unit = [vector / math.sqrt(vector @ vector) for vector in targets.astype(np.float64)]
    mined: dict[tuple, list] = {}
    for t in load_jsonl(run / "sft" / "triplets.jsonl"):
        if not t["held_out"]:
            mined.setdefault((t["user"], t["item"]), []).append(t["positive"])
    users = list(dict.fromkeys(user for user, _ in mined))[:3]
    expected = []
    for (user, item), found in mined.items():
        ranked = [j for j in np.argsort(-cf_item @ cf_user[user]).tolist() if j not in train.row(user)]
        assert set(found) <= set(ranked[3:5])
        if user in users:
            aim = sum(unit[j] for j in found)
            expected.append(aim / math.sqrt(aim @ aim) - unit[item] / 2)
    assert len(expected) == 12  # four pairs of each
    np.testing.assert_allclose(given[0].numpy(), expected, atol=1e-5)


def test_targets_are_centred_and_a_user_s_text_vector_is_the_mean_of_the_items_taken(undisturbed):
    run = undisturbed / "sft"
    item, user_text, item_text = (load_npy(run / f"{name}.npy") for name in ("cf_item", "user_text", "item_text"))
    np.testing.assert_allclose(load_npy(run / "targets.npy"), item - item.astype(np.float64).mean(0), atol=1e-6)
    train = Run(undisturbed).prep().train
    means = [item_text[train.row(u)].mean(0) for u in range(train.n_rows)]
    np.testing.assert_allclose(user_text, means, atol=1e-5)


def test_every_epoch_takes_all_users_in_an_order_of_its_own(toy_run, tmp_path, monkeypatch):
    """And every step the mean of its micro-batches' gradients."""
    users, found, seeds, gradients = [], [], set(), llm.gradients

    def told(model, read, some, *rest):
        assert model.llm.training
        users.extend(some)
        seeds.add(rest[-1])
        found.append(gradients(model, read, some, *rest))
        return found[-1]

    def clip(weights, _):
        for p, one, two in zip(weights, found[-2][1], found[-1][1], strict=True):
            torch.testing.assert_close(p.grad, (one + two) / 2)

    monkeypatch.setattr(llm, "gradients", told)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    run = with_prep(toy_run, tmp_path)
    run_stage("sft", run, "--n-epochs", 2, "--patience", 99, "--grad-accum", 2)
    first, second = users[: len(users) // 2], users[len(users) // 2 :]
    tuned_on = {t["user"] for t in load_jsonl(run / "sft" / "triplets.jsonl") if not t["held_out"]}
    assert sorted(first) == sorted(second) == sorted(tuned_on) and first != second
    assert len(seeds) == len(found)  # dropout of its own for each


def test_triplets_hold_out_whole_users_and_no_prompt_names_an_unseen_item(undisturbed):
    run = undisturbed
    triplets = load_jsonl(run / "sft" / "triplets.jsonl")
    part = {who: {t["user"] for t in triplets if t["held_out"] is who} for who in (True, False)}
    assert len(part[True]) == 12 and not part[True] & part[False]
    train = Csr(load_npy(run / "prep" / "train.indptr.npy"), load_npy(run / "prep" / "train.indices.npy"), 80)
    for t in triplets:
        assert t["item"] == t["negative"] and t["item"] in train.row(t["user"])
        assert t["positive"] not in train.row(t["user"])


def test_a_pool_mines_what_the_guard_leaves_and_profiles_of_a_model_have_vectors_of_their_own(toy_run, tmp_path):
    """A pool that holds every free item, and a guard so strict that some users have none left."""
    run, (model, tokenizer) = with_prep(toy_run, tmp_path), llm.load_llm("tiny", "cpu")
    manifest = load_json(run / "prep" / "manifest.json")
    manifest["knobs"]["profiles"] = "llm"
    save_json(run / "prep" / "manifest.json", manifest)
    words = ("--mining", "pool", "--pool-size", 2000, "--guard-threshold", -1.8, "--pairs-per-user", 2)
    words += ("--temperature", 0.2, "--catalogue-temperature", 0.3)
    words += ("--lora-rank", 4, "--lora-alpha", 12, "--lora-dropout", 0.1)
    run_stage("sft", run, *words, "--target", "text", "--n-epochs", 0)
    sft, prep = run / "sft", Run(run).prep()
    names = ("cf_user", "cf_item", "user_text", "item_text", "targets")
    cf_user, cf_item, user_text, item_text, targets = (load_npy(sft / f"{name}.npy") for name in names)
    blocked = prep.train.union(semantic_guard(item_text, prep.train, -1.8))
    free = {u: [j for j in range(prep.n_items) if j not in blocked.row(u)] for u in range(prep.n_users)}
    best = {u: max(some, key=lambda j: cf_item[j] @ cf_user[u]) for u, some in free.items() if some}
    counts, triplets = load_json(sft / "manifest.json")["counts"], load_jsonl(sft / "triplets.jsonl")
    assert {(t["user"], t["positive"]) for t in triplets} == set(best.items())
    assert counts["triplets"] == len(triplets) == 2 * 8 * len(best)  # two pairs a user, eight positives each
    assert counts["users without an item to mine"] == prep.n_users - len(best) > 0
    limits = (load_json(sft / "manifest.json")["knobs"][f"max_{side}_tokens"] for side in ("user", "item"))
    cut = llm.make_queries(tokenizer, prep.users, prep.items, *limits).n_shortened
    assert counts["prompt parts cut"] == cut > 0
    of_profiles = llm.text_vectors(model, tokenizer, [user["profile"] for user in prep.users])
    np.testing.assert_allclose(user_text, of_profiles, atol=1e-5)
    np.testing.assert_allclose(targets, llm.whiten(item_text), atol=1e-4)
    lora = load_json(sft / "adapter" / "adapter_config.json")
    assert (counts["before"]["head"], counts["kept"]["head"]) == ("random", "solved")
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (4, 12, 0.1)
    # What is told of the held-out triplets, one by one: cos(h, p) > cos(h, n), the share of items above p, two losses.
    tuned = llm.load_negative_model(model, sft, cf_user, cf_item)
    unit = targets / np.linalg.norm(targets, axis=1)[:, None]
    queries, found = llm.make_queries(tokenizer, prep.users, prep.items, 160, 64), []
    for t in triplets:
        if t["held_out"]:
            with torch.no_grad():
                out = tuned(llm.pack([queries.row(t["user"], [t["item"]])]))[1][0].numpy()
            cosine = unit @ (out / np.linalg.norm(out))
            to_p, to_n = cosine[t["positive"]], cosine[t["item"]]
            of_all = math.log(np.exp(cosine / 0.3).sum()) - to_p / 0.3
            found.append((to_p > to_n, (cosine > to_p).mean(), softplus((to_n - to_p) / 0.2), of_all))
    line = load_jsonl(sft / "log.jsonl")[-1]
    told = [line[f"held_out_{name}"] for name in ("accuracy", "rank_of_positive", "own_loss", "catalogue_loss")]
    assert told == pytest.approx(np.mean(found, axis=0), abs=2e-3) and 0 < told[1] < told[0]


def test_what_cannot_be_tuned_is_told(toy_run, tmp_path):
    run = with_prep(toy_run, tmp_path)
    for words, message in (
        (("--rank-from", 9, "--rank-to", 9), "leave no rank to mine from"),
        (("--model", "no/such/model"), "--model no/such/model"),
        (("--pairs-per-user", 1, "--probe-users", 1, "--n-epochs", 0), "step 0: a loss is not finite; raise n_users"),
        (("--guard-threshold", -9), "only 0 users have an item not taken"),
        (("--lr", 1e30, "--eval-every", 2), r"step 2: a loss is not finite; lr 1e\+30 may be too large"),  # case E11
    ):
        with pytest.raises(UserError, match=message):
            run_stage("sft", run, *words)
        assert not (run / "sft").exists()
    items = load_jsonl(run / "prep" / "items.jsonl")
    save_jsonl(run / "prep" / "items.jsonl", ({**item, "title": "", "profile": ""} for item in items))
    for words in (("--target", "text"), ("--guard-threshold", 1)):
        with pytest.raises(UserError, match="need texts; every item is 'an item without title'"):
            run_stage("sft", run, *words)


def test_a_model_or_prompts_that_cannot_be_used_are_told_before_the_warm_up(toy_run, tmp_path, monkeypatch):  # case D14
    monkeypatch.setattr(training, "warm_up", None)
    with pytest.raises(UserError, match=f"--model {tmp_path}: not a folder"):
        run_stage("sft", with_prep(toy_run, tmp_path / "run"), "--model", tmp_path)
    longest: list[int] = []
    monkeypatch.setattr(llm, "check_rows", lambda _name, _model, most: longest.append(most))
    told = "max_user_tokens and max_item_tokens leave no room beside the instructions"
    for n_tokens in (9, 1):
        with pytest.raises(UserError, match=told):
            run_stage("sft", with_prep(toy_run, tmp_path / f"{n_tokens}"), "--max-user-tokens", n_tokens)
    assert longest == [9 + 64, 1 + 64 + 1]  # the preset's item tokens; those of a text, with BOS and EOS


def test_at_most_a_quarter_of_the_users_is_held_out(toy_run, tmp_path):
    run, made = with_prep(toy_run, tmp_path), []
    for asked, n_users, n_seen, n_held_out in ((60, 0, 60, 15), (60, 2, 17, 15), (1, 1, 2, 1)):  # but one in any case
        run_stage("sft", run, "--held-out-users", asked, "--n-epochs", 0, "--n-users", n_users, "--seed", n_users)
        triplets = load_jsonl(run / "sft" / "triplets.jsonl")
        assert len({t["user"] for t in triplets}) == n_seen
        held_out = {t["user"] for t in triplets if t["held_out"]}
        assert len(held_out) == n_held_out
        random = load_file(run / "sft" / "projections.safetensors")["user_projection.weight"]
        made.append((tuple(held_out), random.numpy().tobytes(), load_npy(run / "sft" / "cf_user.npy").tobytes()))
    assert all(len(set(of_seeds)) == 3 for of_seeds in zip(*made, strict=True))


def test_transfer_keeps_the_tuned_weights_and_solves_a_head_of_its_own(toy_run, cli, tmp_path):
    other = ("--preset", "toy", "--run-dir", tmp_path / "run", "--seed", "1")
    assert cli("prep", *other).returncode == 0
    done = cli("sft", *other, "--init-from", toy_run / "sft", "--n-epochs", "0")
    assert done.returncode == 0, done.stderr
    there, here = toy_run / "sft", tmp_path / "run" / "sft"
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (there, here)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(name.endswith("lora_B.weight") and weight.abs().sum() > 0 for name, weight in weights[1].items())
    own = [load_file(folder / "projections.safetensors") for folder in (there, here)]
    same = {name for name in own[0] if torch.equal(own[0][name], own[1][name])}
    assert same == {name for name in own[0] if not name.startswith("head.")}
    assert [line["head"] for line in load_jsonl(here / "log.jsonl")] == ["random", "solved"]  # and no step
    assert cli("generate", *other).returncode == 0


def test_an_adapter_of_another_folder_can_be_tuned_further(toy_run, tmp_path, monkeypatch):
    asked, recompute = [], transformers.PreTrainedModel.gradient_checkpointing_enable
    told = lambda model, how: asked.append(how) or recompute(model, how)  # noqa: E731
    monkeypatch.setattr(transformers.PreTrainedModel, "gradient_checkpointing_enable", told)
    run = with_prep(toy_run, tmp_path)
    words = ("--n-users", 8, "--eval-every", 1, "--checkpointing", "--target", "text")  # whose head is another
    run_stage("sft", run, "--init-from", toy_run / "sft", *words)
    assert load_json(run / "sft" / "manifest.json")["counts"]["kept"]["step"] > 0
    before, after = (load_file(f / "sft" / "adapter" / "adapter_model.safetensors") for f in (toy_run, run))
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert asked == [{"use_reentrant": False}]  # case D10


def test_an_adapter_of_another_shape_is_refused(toy_run, tmp_path):
    folder = shutil.copytree(toy_run / "sft", tmp_path / "sft")
    config = load_json(folder / "adapter" / "adapter_config.json")
    save_json(folder / "adapter" / "adapter_config.json", config | {"r": config["r"] + 1})
    with pytest.raises(UserError, match=f"{folder / 'adapter'}: no PEFT adapter of this model"):
        run_stage("sft", with_prep(toy_run, tmp_path / "run"), "--init-from", folder)


def test_an_adapter_of_other_knobs_is_refused_before_anything_is_computed(toy_run, tmp_path):
    run = with_prep(toy_run, tmp_path)
    for knob, value, its in (
        ("--model", "other", "model = tiny"),
        ("--lora-rank", 3, "lora_rank = 32"),
        ("--lora-alpha", 3, "lora_alpha = 64"),
        ("--lora-dropout", 0.5, "lora_dropout = 0.05"),
    ):
        with pytest.raises(UserError, match=f"init_from .* was tuned with {its}; take the same"):
            run_stage("sft", run, "--init-from", toy_run / "sft", knob, value)
    with pytest.raises(UserError, match=r"manifest.json: No such file"):
        run_stage("sft", run, "--init-from", toy_run / "sft" / "adapter")
    with pytest.raises(UserError, match="was tuned with model = None"):
        run_stage("sft", run, "--init-from", toy_run / "prep")
    assert [path.name for path in run.iterdir()] == ["prep"]


# ---- several processes ----------------------------------------------------------------------------------------------

# 12 micro-batches an epoch, so steps of 11 and of 1: uneven shares, and a process without any. Files of two batches,
# the last one of one.
SHARED = [("sft", "--grad-accum", "11", "--n-epochs", "2", "--eval-every", "1"), ("generate", "--rows-per-shard", "7")]


def launch(how, file, *words):
    """Two processes on the CPU, over gloo."""
    line = ["-m", "accelerate.commands.launch", how, "--num_processes", "2", "--main_process_port", "0", file, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, line)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def by_one(request, toy_run, tmp_path_factory):
    run = with_prep(toy_run, tmp_path_factory.mktemp("one"))
    for stage, *words in SHARED:
        run_stage(stage, run, *words, *(request.param if stage == "sft" else ()))
    return run


# Whole models, or one model's weights in shares. Those drop out by whole batches, one process alone, where its sums
# depend on the number of threads, by parts of them; so there without dropout.
@pytest.mark.parametrize(
    ("how", "by_one"), [("--multi_gpu", ()), ("--use_fsdp", ("--lora-dropout", 0))], indirect=["by_one"]
)
def test_two_processes_tune_and_generate_what_one_does(request, by_one, toy_run, tmp_path, how):
    """Equal to 1e-6 (vectors: 1e-3): gradients are summed in another order. The sharded tuning is killed on its way."""
    run = with_prep(toy_run, tmp_path)
    for stage, *words in SHARED:
        if stage == "sft":
            words += request.node.callspec.params["by_one"]
        line = (how, stage_file(stage), "--preset", "toy", "--device", "cpu", "--run-dir", run, *words)
        if (how, stage) == ("--use_fsdp", "sft"):
            process = launch(*line)
            while not (run / ".sft.partial" / "checkpoint.safetensors").exists():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            process.terminate()
            process.communicate()
            assert not (run / "sft").exists()
        process = launch(*line)
        told = process.communicate()[1]
        assert process.returncode == 0, told
        assert ("going on after step" in told) is ((how, stage) == ("--use_fsdp", "sft"))
        assert sorted(p.name for p in (by_one / stage).rglob("*")) == sorted(p.name for p in (run / stage).rglob("*"))
    for name in ("adapter/adapter_model", "projections"):
        tables = [load_file(r / "sft" / f"{name}.safetensors") for r in (by_one, run)]
        assert tables[0].keys() == tables[1].keys()
        for key in tables[0]:
            torch.testing.assert_close(tables[0][key], tables[1][key], atol=1e-6, rtol=1e-4)
    h = [load_npy(r / "generate" / "embeddings.npy").astype(np.float32) for r in (by_one, run)]
    np.testing.assert_allclose(h[0], h[1], atol=1e-3, rtol=1e-3)
    logs = [load_jsonl(r / "sft" / "log.jsonl") for r in (by_one, run)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [0, 0, 1, 2, 3, 4]
    for one, two in zip(logs[0][2:], logs[1][2:], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_work_in_progress_is_deleted_when_no_process_looks_for_it_any_more(tmp_path, monkeypatch):
    """A slow process that found its checkpoint or shard missing would begin anew, alone, and wait for the others."""
    kept = []

    def wait():
        work = "checkpoint", "shard", "warm_up"
        kept.append(sorted(p.name for p in tmp_path.glob(".*.partial/*") if p.name.startswith(work)))

    team = SimpleNamespace(is_main_process=True, wait_for_everyone=wait, destroy_process_group=lambda: None)
    run_stage("prep", tmp_path)
    monkeypatch.setattr(artifacts, "_team", lambda stage, run: team)
    run_stage("sft", tmp_path, "--n-users", 8, "--pairs-per-user", 1)
    run_stage("generate", tmp_path, "--pairs-per-user", 1)
    assert kept == [[], ["checkpoint.safetensors", "warm_up.safetensors"], [], ["shard000000000.npy"]]
    assert not [*tmp_path.glob("*/checkpoint*"), *tmp_path.glob("*/warm_up*"), *tmp_path.glob("*/shard*")]


def test_sharded_weights_are_half_in_each_of_two_processes(tmp_path):
    file = tmp_path / "count.py"
    file.write_text(
        "import pathlib, accelerate\n"
        "from hnlm_ref import llm\n"
        "team = accelerate.PartialState(cpu=True)\n"
        "model, _ = llm.load_llm('tiny', 'cpu')\n"
        "here = [p.to_local() if hasattr(p, 'to_local') else p for p in model.parameters()]\n"
        "count = str(sum(p.numel() for p in here))\n"
        "pathlib.Path(__file__).with_name(f'count{team.process_index}').write_text(count, encoding='utf-8')\n",
        encoding="utf-8",
    )
    process = launch("--use_fsdp", file)
    error = process.communicate()[1]
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32  # q and o, k and v, the MLP, two norms
    here = 2 * 258 * 32 + (2 * layer + 32) // 2  # whole embeddings in and out; half of two layers and of the last norm
    assert process.returncode == 0, error
    counts = [int((tmp_path / f"count{n}").read_text(encoding="utf-8")) for n in range(2)]  # two writers mix in a pipe
    assert counts == [here, here]


def test_what_cannot_be_shared_is_refused(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "sharded", lambda: True)
    with pytest.raises(UserError, match=r"no --use_fsdp; the model is any, on cuda"):
        llm.load_llm("any", "cuda", load_in_4bit=True)
    shutil.copytree(toy_run, tmp_path / "run")
    monkeypatch.setattr(accelerate, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match=r"--mode text: .* without torchrun"):
        run_stage("generate", tmp_path / "run", "--mode", "text")
    with pytest.raises(UserError, match=r"max_similarity 0\.5: titles have no upper limit"):
        run_stage("generate", tmp_path / "run", "--mode", "text", "--match", "title", "--max-similarity", 0.5)
