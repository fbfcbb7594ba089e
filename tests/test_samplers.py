"""Negative samplers: the collected cases, slow twins on the same random stream, or exact distributions."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hnlm_ref import _core, samplers
from hnlm_ref.artifacts import Csr, save_npy
from hnlm_ref.console import UserError
from hnlm_ref.samplers import Batch, Sampler

SAMPLERS = ("uniform", "popularity", "dns", "dns_mn", "mixgcf", "ahns", "hnlm", "hnlm_matched", "hnlm_pool")


def csr(rows, n_cols):
    return Csr.from_pairs(
        np.repeat(np.arange(len(rows)), [len(r) for r in rows]), np.concatenate(rows), len(rows), n_cols
    )


def random_train(n_users=50, n_items=40, seed=0):
    rng = np.random.default_rng(seed)
    return csr([rng.choice(n_items, rng.integers(1, n_items - 3), replace=False) for _ in range(n_users)], n_items)


def random_layers(train, dim=4, n_layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(train.n_rows + train.n_cols, dim, generator=generator) for _ in range(n_layers)]


def pick(sampler, pairs, layers, seed=0, epoch=1, rows=None):
    """One batch of all `pairs`, as the training loop would make it."""
    drawn = torch.from_numpy(sampler.draw(np.ascontiguousarray(pairs[:, 0]), seed)).long()
    rows = torch.arange(len(pairs)) if rows is None else rows
    batch = Batch(epoch, rows, *torch.from_numpy(pairs.astype(np.int64)).T, drawn)
    mean = torch.stack(layers).mean(0)
    n_users = sampler.train.n_rows
    return batch, sampler.pick(batch, layers, mean[:n_users], mean[n_users:])


def write_generated(folder: Path, made_for, n_items, n_matches=5, seed=0, **changes):
    rng = np.random.default_rng(seed)
    arrays = {
        "pairs": np.asarray(made_for, np.int32),
        "embeddings": rng.standard_normal((len(made_for), 8)).astype(np.float16),
        "matches": rng.integers(0, n_items, (len(made_for), n_matches)).astype(np.int32),
        "match_scores": np.sort(rng.random((len(made_for), n_matches), np.float32))[:, ::-1].copy(),
    } | changes
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        save_npy(folder / f"{name}.npy", array)
    return folder


def generated(folder, train, min_coverage=0.5, blocked=None, by_item=False):
    pairs = samplers.trainable_pairs(train)
    return samplers.load_generated(folder, train, pairs, min_coverage, blocked, "cpu", by_item)


def test_a_pair_without_a_matched_item_has_no_generated_negative_for_a_sampler_of_items(tmp_path):
    train = csr([[0, 1], [2, 3]], 6)
    matches = np.array([[4, 5], [-1, -1], [4, -1], [3, -1]], np.int32)  # the last is a training item of user 1
    folder = write_generated(tmp_path / "g", train.pairs(), 6, n_matches=2, matches=matches)
    assert (generated(folder, train).row_of >= 0).tolist() == [True] * 4
    assert (generated(folder, train, by_item=True).row_of >= 0).tolist() == [True, False, True, False]
    with pytest.raises(UserError, match=r"only 50\.0% of the training pairs have a generated negative"):
        generated(folder, train, min_coverage=0.6, by_item=True)


def test_a_popularity_that_cannot_draw_is_one_sentence():
    train = csr([[0, 1], [0]], 3)  # nobody took item 2, so nothing is left to draw for user 0
    with pytest.raises(UserError, match=r"user 0 has no free item to draw .* take another sampler"):
        Sampler("popularity", train).draw(np.zeros(1, np.int32), 0)
    with pytest.raises(UserError, match=r"weights is inf.*; lower popularity_beta"):
        Sampler("popularity", train, popularity_beta=2000).draw(np.ones(1, np.int32), 0)


@pytest.fixture
def pool(case_input):
    """The pool of case B07 as scores [B=1, n=1, M], and its items."""
    case = json.loads(case_input("b05_pool.json").read_text(encoding="utf-8"))
    return case["pool_items"], torch.tensor([[case["pool_scores"]]]), case


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_returns_a_training_positive(name, tmp_path):  # case B03
    train = random_train()
    pairs = samplers.trainable_pairs(train)
    free = [np.setdiff1d(np.arange(40), train.row(u)) for u in pairs[:, 0]]
    matches = np.stack([np.resize(f, 5) for f in free]).astype(np.int32)
    made = generated(write_generated(tmp_path / "g", pairs, 40, matches=matches), train)
    sampler = Sampler(name, train, generated=made)
    pairs = np.repeat(pairs, 1 + 100_000 // len(pairs), axis=0)
    rows = torch.arange(train.nnz).repeat_interleave(len(pairs) // train.nnz)
    batch, (items, vectors) = pick(sampler, pairs, random_layers(train), rows=rows)
    known = set(map(tuple, train.pairs().tolist()))
    assert len(items) >= 100_000
    assert vectors.shape == (len(pairs), 1, 4)
    assert known.isdisjoint(zip(batch.users.tolist(), items[:, 0].tolist(), strict=True))


def test_held_out_items_are_drawn_at_the_chance_rate():  # case B04: nothing but train is handed over
    train = csr([[0, 1, 2], [5]], 10)
    drawn = Sampler("uniform", train).draw(np.zeros(70_000, np.int32), 3).ravel()
    assert np.bincount(drawn, minlength=10)[3:] / 70_000 == pytest.approx(np.full(7, 1 / 7), abs=0.01)


def test_the_one_free_item_of_ten_thousand_is_every_draw():  # case B02
    train = csr([np.delete(np.arange(10_000), 4321)], 10_000)
    assert (Sampler("uniform", train, n_negatives=1000).draw(np.zeros(1, np.int32), 0) == 4321).all()
    assert (Sampler("popularity", train, popularity_beta=0).draw(np.zeros(1000, np.int32), 0) == 4321).all()


@pytest.mark.parametrize("beta", [0.0, 0.75, 1.0])
def test_popularity_draws_by_count_to_the_power_of_beta(beta):  # case B06
    counts = np.array([8, 1, 1])
    train = csr([[0]] * 7 + [[0, 1], [2], []], 3)  # user 7 owns items 0 and 1, user 9 nothing
    drawn = Sampler("popularity", train, popularity_beta=beta).draw(np.repeat([9, 0], 100_000).astype(np.int32), 5)
    everything, owner = (np.bincount(part.ravel(), minlength=3) / 100_000 for part in np.split(drawn, 2))
    assert everything == pytest.approx(counts**beta / (counts**beta).sum(), abs=0.01)
    assert owner == pytest.approx([0, 0.5, 0.5], abs=0.01)


def test_dns_takes_the_hardest_and_the_first_drawn_of_a_tie(pool):  # case B07
    items, scores, _ = pool
    item_emb, one = torch.zeros(10, 1), torch.zeros(1, dtype=torch.int64)
    item_emb[items] = scores.view(-1, 1)
    batch = samplers.Batch(1, one, one, one, torch.tensor([[items]]))
    found, vectors = Sampler("dns", csr([[0]], 10)).pick(batch, [], torch.ones(1, 1), item_emb)
    assert found.tolist() == [[9]] and vectors.tolist() == [[item_emb[9].tolist()]]


def test_dns_mn_draws_evenly_among_the_n_best(pool):  # case B07
    items, scores, _ = pool
    many = scores.expand(10_000, 1, 4)
    torch.manual_seed(0)
    best_two = np.array(items)[samplers.pick_among_top(many, 2).ravel()]
    assert np.mean(best_two == 9) == pytest.approx(0.5, abs=0.02)
    assert set(best_two) == {9, 6}
    assert set(np.array(items)[samplers.pick_among_top(many, 1).ravel()]) == {9}
    all_four = samplers.pick_among_top(many, 4).ravel().bincount() / 10_000
    assert all_four.tolist() == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("base", ["uniform", "popularity", "dns", "dns_mn", "ahns"])
def test_a_base_sampler_never_picks_a_place_without_a_candidate(base, tmp_path):
    train = csr([[1, 2], [0]], 6)
    matches = np.array([[0, -1], [4, -1], [-1, -1]], np.int32)  # one matched item, or none
    made = generated(write_generated(tmp_path / "g", train.pairs(), 6, n_matches=2, matches=matches), train)
    sampler = Sampler("hnlm_matched", train, base_sampler=base, n_top=3, n_matched=9, generated=made)
    rows = torch.tensor([0, 1, 2] * 50)
    _, (items, _) = pick(sampler, np.tile(train.pairs(), (50, 1)), random_layers(train), rows=rows)
    assert items[rows < 2].unique().tolist() == [0, 4]
    assert items.min() >= 0


@pytest.mark.parametrize(("pos_score", "item"), [(0.0, 4), (1.0, 4), (-0.9, 9)])
def test_ahns_gives_high_scoring_positives_easier_negatives(pool, pos_score, item):  # case B08
    items, scores, case = pool
    place = samplers.pick_adaptive(scores, torch.tensor([pos_score]), **case["ahns"])
    assert items[place.item()] == item


def test_ahns_stays_finite_where_its_power_is_undefined():
    scores = torch.tensor([[[0.1, 0.9]]])
    assert samplers.pick_adaptive(scores, torch.tensor([-5.0]), 1.0, 0.1, -1.5).item() == 1  # target is huge: hardest


@pytest.mark.parametrize("name", ["dns", "dns_mn", "ahns", "mixgcf"])
def test_pool_samplers_equal_a_plain_loop(name):
    train, dim = random_train(6, 12, seed=1), 4
    layers = random_layers(train, dim)
    pairs = samplers.trainable_pairs(train)
    sampler = Sampler(name, train, pool_size=5, n_negatives=2, n_top=3)
    torch.manual_seed(7)
    batch, (items, vectors) = pick(sampler, pairs, layers)
    torch.manual_seed(7)  # the twin reads the same stream
    if name == "dns_mn":
        places = (3 * torch.rand(len(pairs), 2)).long().tolist()
    share = torch.rand(3).tolist() if name == "mixgcf" else []
    table = [layer.double().numpy() for layer in layers]
    mean = sum(table) / 3
    for r, n in itertools.product(range(len(pairs)), range(2)):
        u, i, drawn = int(batch.users[r]), int(batch.items[r]), batch.candidates[r, n].tolist()
        scores = [mean[u] @ mean[6 + j] for j in drawn]
        if name == "mixgcf":
            expected, origin = np.zeros(dim), []
            for layer in range(3):
                mixed = [share[layer] * table[layer][6 + i] + (1 - share[layer]) * table[layer][6 + j] for j in drawn]
                best = int(np.argmax([mean[u] @ m for m in mixed]))
                expected += mixed[best] / 3
                origin.append(drawn[best])
            assert items[r, n] == origin[0]
            assert vectors[r, n].numpy() == pytest.approx(expected, abs=1e-5)
            continue
        if name == "dns":
            j = drawn[int(np.argmax(scores))]
        elif name == "dns_mn":
            j = drawn[sorted(range(5), key=lambda c: -scores[c])[places[r][n]]]
        else:
            target = 0.1 * max(mean[u] @ mean[6 + i] + 1, 1e-6) ** -1
            j = drawn[int(np.argmin([abs(s - target) for s in scores]))]
        assert items[r, n] == j
        assert vectors[r, n].numpy() == pytest.approx(mean[6 + j], abs=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n_rows", [1, 4])
def test_one_row_has_the_shapes_of_many(name, n_rows, tmp_path):  # cases B09, B12
    train = random_train()
    made = generated(write_generated(tmp_path / "g", train.pairs(), 40), train)
    sampler = Sampler(name, train, n_negatives=3, generated=made)
    _, (items, vectors) = pick(sampler, train.pairs()[:n_rows], random_layers(train))
    assert items.shape == (n_rows, 3)
    assert vectors.shape == (n_rows, 3, 4)


def test_a_pool_larger_than_what_is_free_repeats_candidates():  # case B11: with replacement, never short
    train = csr([np.arange(7)], 10)
    drawn = Sampler("dns", train, pool_size=50).draw(np.zeros(1, np.int32), 0)
    assert drawn.shape == (1, 1, 50)
    assert set(drawn.ravel()) == {7, 8, 9}


def test_epochs_differ_and_a_seed_repeats_for_any_number_of_threads():  # cases B05, B13
    users = np.arange(50, dtype=np.int32)
    one, again, other = (
        Sampler("dns", random_train(), n_threads=t).draw(users, s) for t, s in ((1, 7), (8, 7), (1, 8))
    )
    assert (one == again).all()
    assert (one != other).any()


# ---- the guard --------------------------------------------------------------------------------------------------


def test_the_guard_blocks_what_a_plain_loop_blocks():
    rows, rng = [row.tolist() for row in map(random_train(8, 30, seed=2).row, range(8))], np.random.default_rng(3)
    train = csr([*rows, [7]], 30)
    text = rng.standard_normal((30, 6)).astype(np.float32)
    text[4] = 0  # no text
    blocked = samplers.semantic_guard(text, train, 0.8)
    for u in range(9):
        near = []
        for j in range(30):
            norms = [max(np.linalg.norm(text[j]) * np.linalg.norm(text[i]), 1e-30) for i in train.row(u)]
            cosines = sorted(float(text[j] @ text[i]) / norm for i, norm in zip(train.row(u), norms, strict=True))
            near.append(np.mean(cosines[-3:]))
        others = [near[j] for j in range(30) if j not in train.row(u)]
        expected = [j for j in range(30) if near[j] > np.mean(others) + 0.8 * np.std(others)]
        assert blocked.row(u).tolist() == expected


def test_the_guard_finds_the_three_nearest_among_more_items_than_it_looks_at_together():
    # The user took 2,500 items: three point along the first axis, the others along the second. Of the four items
    # left one has cosine 1 with those three, so its mean of the three largest is 1; the others have 0.
    train = csr([range(2_500)], 2_504)
    text = np.tile(np.float32([0, 1, 0]), (2_504, 1))
    text[[10, 1_500, 2_400, 2_501]] = [1, 0, 0]
    text[[2_500, 2_502, 2_503]] = [0, 0, 1]
    assert samplers.semantic_guard(text, train, 1.5).row(0).tolist() == [*range(2_500), 2_501]


def test_guarded_draws_are_uniform_over_what_is_left():
    train, blocked = csr([[0], [0]], 6), csr([[1, 2], [1, 2, 3, 4, 5]], 6)
    drawn = Sampler("dns", train, pool_size=4, blocked=blocked).draw(np.zeros(20_000, np.int32), 1)
    assert drawn.shape == (20_000, 1, 4)
    # A row of 12 draws holds none of the three free items with probability (2/5)^12 < 2e-5.
    assert np.bincount(drawn.ravel(), minlength=6)[1:] / 80_000 == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3], abs=0.01)
    # All four candidates of a row are one item in 3 of 3^4 cases.
    assert (drawn.min(2) < drawn.max(2)).mean() == pytest.approx(1 - 1 / 27, abs=0.01)
    everything_blocked = Sampler("uniform", train, blocked=blocked).draw(np.ones(100, np.int32), 1)
    assert set(everything_blocked.ravel()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(("name", "size"), [("dns", 4), ("popularity", 1)])
def test_of_eight_more_draws_the_guard_keeps_the_first_again_and_again_if_they_are_too_few(name, size):
    train = csr([[0], [0], [0, 1, 2, 3, 4, 5, 6, 7]], 8)
    blocked = csr([[1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]], 8)
    rows = np.repeat(np.array([0, 1], np.int32), 200)
    if name == "dns":
        drawn = Sampler("dns", train, pool_size=size + 8).draw(rows, 3)[:, 0]
    else:
        counts = np.bincount(train.indices).astype(float)
        drawn = _core.sample_popularity(train.indptr, train.indices, counts, rows, size + 8, 3, 0)
    passed = [[i for i in row if i not in blocked.row(user)] or row[:1] for user, row in zip(rows, drawn, strict=True)]
    assert {min(len(row), size + 1) for row in passed} >= {size, size + 1} and (drawn[:, 0] < 4).any()
    expected = [[row[place % len(row)] for place in range(size)] for row in passed]
    guarded = Sampler(name, train, pool_size=4, popularity_beta=1.0, blocked=blocked)
    assert guarded.draw(rows, 3)[:, 0].tolist() == expected


# ---- generated negatives ----------------------------------------------------------------------------------------


def test_matched_items_are_drawn_by_temperature(tmp_path):
    train = csr([[0]], 6)
    scores = np.array([[0.3, 0.2, 0.1, 0.9]], np.float32)
    folder = write_generated(
        tmp_path / "g", [[0, 0]], 6, matches=np.array([[3, 4, 5, -1]], np.int32), match_scores=scores
    )
    sampler = Sampler("hnlm_matched", train, generated=generated(folder, train), match_temperature=0.1)
    pairs = np.zeros((30_000, 2), np.int32)
    torch.manual_seed(0)
    _, (items, _) = pick(sampler, pairs, random_layers(train), rows=torch.zeros(30_000, dtype=torch.int64))
    weights = np.exp([3, 2, 1])
    assert np.bincount(items.ravel(), minlength=6) / 30_000 == pytest.approx(
        [0, 0, 0, *weights / weights.sum()], abs=0.01
    )


def test_matched_share_rises_over_the_ramp(tmp_path):
    train = csr([[0]], 1000)
    folder = write_generated(
        tmp_path / "g", [[0, 0]], 1000, matches=np.array([[7]], np.int32), match_scores=np.ones((1, 1), np.float32)
    )
    sampler = Sampler("hnlm_matched", train, generated=generated(folder, train), matched_share=0.8, n_ramp_epochs=3)
    pairs, rows = np.zeros((20_000, 2), np.int32), torch.zeros(20_000, dtype=torch.int64)
    for epoch, expected in ((1, 0.2), (2, 0.4), (4, 0.8), (9, 0.8)):
        _, (items, _) = pick(sampler, pairs, random_layers(train), rows=rows, epoch=epoch)
        assert (items == 7).float().mean().item() == pytest.approx(expected, abs=0.02)
        others = np.delete(np.bincount(items.ravel(), minlength=1000), 7)
        assert others.max() < 60  # drawn uniformly: about 20 of each


def test_matched_items_join_the_pool_and_win_only_when_they_score_higher(tmp_path):
    train = random_train()
    pairs = samplers.trainable_pairs(train)
    folder = write_generated(tmp_path / "g", pairs, 40, n_matches=3)
    made, layers = generated(folder, train), random_layers(train)
    sampler = Sampler("hnlm_pool", train, generated=made, n_matched=3, pool_size=2)
    batch, (items, _) = pick(sampler, pairs, layers)
    mean = torch.stack(layers).mean(0)
    for r in range(len(pairs)):
        union = batch.candidates[r, 0].tolist() + [j for j in made.matches[r].tolist() if j >= 0]
        best = max(float(mean[pairs[r, 0]] @ mean[50 + j]) for j in union)
        assert float(mean[pairs[r, 0]] @ mean[50 + items[r, 0]]) == pytest.approx(best)


def test_pairs_without_a_generated_negative_keep_the_sampled_one(tmp_path, capsys):  # case E12
    train = random_train()
    pairs = train.pairs()
    some = np.sort(np.random.default_rng(0).permutation(len(pairs))[: int(0.7 * len(pairs))])
    made = generated(write_generated(tmp_path / "g", pairs[some], 40), train)
    assert f"generated negatives for 70.0% of {len(pairs):,} training pairs" in capsys.readouterr().err
    has, h = made.vectors_of(torch.arange(len(pairs)))
    assert has.tolist() == some.tolist()
    assert h.numpy() == pytest.approx(np.load(tmp_path / "g" / "embeddings.npy").astype(np.float32))
    missing = np.setdiff1d(np.arange(len(pairs)), some)
    assert (made.matches_of(torch.from_numpy(missing))[0] == -1).all()
    plain = Sampler("uniform", train)
    for name in ("hnlm", "hnlm_matched"):
        _, (items, _) = pick(Sampler(name, train, generated=made), pairs, random_layers(train))
        assert (items[missing, 0].numpy() == plain.draw(pairs[:, 0].copy(), 0)[missing, 0, 0]).all()


def test_matched_items_that_are_positives_or_guarded_are_dropped(tmp_path):  # case B15
    train, blocked = csr([[3, 8]], 10), csr([[5]], 10)
    folder = write_generated(
        tmp_path / "g",
        [[0, 3], [0, 8]],
        10,
        matches=np.array([[8, 4, 5]] * 2, np.int32),
        match_scores=np.ones((2, 3), np.float32),
    )
    assert generated(folder, train, blocked=blocked).matches.tolist() == [[-1, 4, -1]] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": np.array([[0, 1], [1, 0]], np.int32)}, "row 1, user 1 and item 0, is no training pair"),  # E13
        ({"pairs": np.array([[0, 1], [0, 1]], np.int32)}, "row 0, user 0 and item 1, comes twice"),
        ({"pairs": np.array([[0, 1], [9, 1]], np.int32)}, "lies outside 2 users and 4 items"),
        ({"pairs": np.array([[0, 1], [-1, 3]], np.int32)}, "pairs.npy: a number lies outside 2 users and 4 items"),
        ({"pairs": np.array([[0, 1]], np.int32)}, "pairs int32 (1, 2), embeddings float16 (2, 8)"),
        ({"pairs": np.array([0, 1], np.int32)}, "pairs int32 (2,)"),
        ({"pairs": np.zeros((2, 3), np.int32)}, "pairs int32 (2, 3)"),
        ({"matches": np.full((2, 5), 4, np.int32)}, "matches.npy: a number lies outside 2 users and 4 items"),
        ({"match_scores": np.float32([[0.9, 0.8, 0.7, 0.6, np.nan]] * 2)}, "match_scores.npy: row 0 holds a number"),
        ({"match_scores": np.ones((2, 5), np.int32)}, "match_scores int32 (2, 5)"),
        ({"match_scores": np.ones((2, 4), np.float32)}, "match_scores float32 (2, 4)"),
        ({"matches": np.zeros((1, 5), np.int32), "match_scores": np.ones((1, 5), np.float32)}, "matches int32 (1, 5)"),
        ({"matches": np.zeros((2, 0), np.int32), "match_scores": np.ones((2, 0), np.float32)}, "matches int32 (2, 0)"),
        (
            {"embeddings": np.array([[1, 2], [3, np.nan]], np.float16)},
            "row 1, user 1 and item 3, holds a number that is not finite",
        ),  # D12
        (
            {"embeddings": np.array([[1, 2], [5, 5]], np.float16)},
            "row 1, user 1 and item 3, has one value throughout",
        ),  # E14
        ({"embeddings": np.array([1, 2], np.float16)}, "embeddings float16 (2,)"),
        ({"embeddings": np.zeros((2, 0), np.float16)}, "embeddings float16 (2, 0)"),
        ({"matches": np.array([2, 2], np.int32)}, "matches int32 (2,)"),  # B16: one item where a list is wanted
        ({"matches": np.array([["2"] * 5] * 2)}, "matches <U1 (2, 5)"),  # B16: texts where numbers are wanted
    ],
)
def test_generated_arrays_that_cannot_be_right_are_refused(tmp_path, changes, message):
    train = csr([[0, 1], [3]], 4)
    folder = write_generated(tmp_path / "g", [[0, 1], [1, 3]], 4, **changes)
    with pytest.raises(UserError) as error:
        generated(folder, train)
    assert message in str(error.value)


def test_a_pair_behind_the_last_training_pair_is_refused(tmp_path):
    folder = write_generated(tmp_path / "g", [[0, 1], [1, 3]], 4)
    with pytest.raises(UserError, match="row 1, user 1 and item 3, is no training pair"):
        generated(folder, csr([[0, 1], [2]], 4))


def test_the_logged_percentile_is_the_share_of_items_scored_lower():
    item_emb = torch.tensor([[1.0, 1], [2, 0], [0, 4], [1, 2]])  # scored by (1, 1): 2, 2, 4, 3
    users, negatives = torch.ones(2, 2), item_emb[torch.tensor([[3, 0], [1, 2]])]  # [2, 2, 2], the second is not asked
    assert samplers.percentile(users, negatives, item_emb).item() == (2 / 4 + 0 / 4) / 2
    assert samplers.percentile(users, negatives, item_emb, n_rows=1).item() == 2 / 4


def test_a_pool_that_matched_items_join_has_its_own_size_and_is_drawn_evenly():
    train = csr([[0], [1], [1]], 30)
    draws = [
        Sampler(name, train, base_sampler="popularity", pool_size=3).draw(np.zeros(9, np.int32), 1)
        for name in ("hnlm_pool", "hnlm_matched")
    ]
    assert [drawn.shape for drawn in draws] == [(9, 1, 3), (9, 1, 1)]
    assert set(draws[1].ravel()) == {1} != set(draws[0].ravel())  # by popularity there is one item user 0 has not taken


def test_a_place_without_a_match_needs_no_score(tmp_path):
    matches, scores = np.array([[1, -1], [-1, -1]], np.int32), np.full((2, 2), np.nan, np.float32)
    scores[0, 0] = 0.5
    folder = write_generated(tmp_path / "g", [[0, 0], [1, 0]], 4, 2, matches=matches, match_scores=scores)
    found, _ = generated(folder, csr([[0], [0]], 4)).matches_of(torch.arange(2))
    assert found.tolist() == [[1, -1], [-1, -1]]


def test_a_vector_of_zeros_counts_as_none(tmp_path):  # a reply that named no item
    train = csr([[0, 1], [3]], 4)
    vectors = np.array([[1, 2], [0, 0], [3, 6]], np.float16)
    made = generated(write_generated(tmp_path / "g", train.pairs(), 4, embeddings=vectors), train)
    assert made.row_of.tolist() == [0, -1, 2]
    assert made.mean.tolist() == [2, 4]
    assert made.deviation.tolist() == [1, 2]


def test_more_vectors_than_are_read_at_once_are_one_table(tmp_path):  # they are read by 4,096
    train = csr([range(100)] * 42, 101)
    vectors = np.random.default_rng(0).standard_normal((4200, 8)).astype(np.float16)
    vectors[[50, 4150]] = 0
    found = generated(write_generated(tmp_path / "g", train.pairs(), 101, embeddings=vectors), train)
    assert torch.nonzero(found.row_of < 0)[:, 0].tolist() == [50, 4150]
    kept = np.delete(vectors, [50, 4150], 0).astype(np.float64)
    assert found.mean == pytest.approx(kept.mean(0), abs=1e-6) and found.deviation == pytest.approx(
        kept.std(0), abs=1e-6
    )
    vectors[4160, 3] = np.nan
    with pytest.raises(UserError, match="row 4160, user 41 and item 60, holds a number that is not finite"):
        generated(write_generated(tmp_path / "g", train.pairs(), 101, embeddings=vectors), train)


def test_too_small_a_coverage_is_refused_and_zero_always(tmp_path):  # cases E12, E13
    train = csr([[0, 1], [3]], 4)
    folder = write_generated(tmp_path / "g", [[0, 1]], 4)
    with pytest.raises(UserError, match=r"only 33\.3% of the training pairs"):
        generated(folder, train)
    assert generated(folder, train, min_coverage=0.3).row_of.tolist() == [-1, 0, -1]
    nothing = write_generated(tmp_path / "none", np.empty((0, 2), np.int32), 4)
    with pytest.raises(UserError, match=r"only 0\.0%"):
        generated(nothing, train, min_coverage=0.0)
