"""Losses of the recommender against the collected cases, and against loops on small examples."""

import math

import numpy as np
import pytest
import torch

from hnlm_ref import losses


def tensor(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_a_total_of_many_numbers_is_the_same_for_any_number_of_threads():
    before, x = torch.get_num_threads(), torch.rand(100_003, generator=torch.Generator().manual_seed(0))
    found = {}
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            pos, neg = x[:50_000], x[50_000:100_000, None]
            gaps = neg - pos[:, None]
            table, rows = x[:80_000].view(-1, 1), torch.arange(80_000)
            values = losses.total(x), losses.bpr_loss(gaps), losses.l2_loss(table, rows)
            values += losses.hinge_loss(gaps, 0.3), losses.anchor_loss(pos[:, None], neg)
            found[n_threads] = [value.item() for value in values]
    finally:
        torch.set_num_threads(before)
    assert found[1] == found[2] == found[3]
    assert found[1][0] == pytest.approx(math.fsum(x.tolist()), rel=1e-6)
    assert found[1][1] == pytest.approx(torch.nn.functional.softplus(neg[:, 0] - pos).double().mean().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(2048,), (700, 3), (0,)], ids=str)
def test_rows_are_taken_and_their_gradients_added_up_the_same_for_any_number_of_threads(shape):
    random, before = np.random.default_rng(0), torch.get_num_threads()
    rows, weights = random.integers(0, 600, shape), random.normal(size=(*shape, 64)).astype(np.float32)
    table, found = torch.from_numpy(random.normal(size=(700, 64)).astype(np.float32)).requires_grad_(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            table.grad = None
            taken = losses.take(table, torch.from_numpy(rows))
            (taken * torch.from_numpy(weights)).sum().backward()
            found.append(table.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(taken.detach().numpy(), table.detach().numpy()[rows])
    expected = np.zeros((700, 64))
    np.add.at(expected, rows, weights)
    assert table.grad.numpy() == pytest.approx(expected, abs=1e-5)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("n_candidates", [8, 60])  # a row has more candidates than there are items
def test_the_scores_of_candidates_are_those_of_the_whole_product_for_any_number_of_threads(n_candidates):
    random, before, found = np.random.default_rng(0), torch.get_num_threads(), []
    users, items = (random.integers(-9, 10, (n, 64)).astype(np.float32) for n in (700, 90))  # sums of these are exact
    candidates = random.integers(0, 90, (700, 2, n_candidates))  # in no order, some of them twice
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(losses.scores_of(*map(torch.from_numpy, (users, items, candidates))).numpy())
    finally:
        torch.set_num_threads(before)
    expected = np.take_along_axis(users @ items.T, candidates.reshape(700, -1), axis=1).reshape(candidates.shape)
    assert all(np.array_equal(scores, expected) for scores in found)


def test_a_gap_is_the_negative_s_score_less_the_positive_s():
    e_u, e_i = tensor([[1.0, 2.0], [0.0, -1.0]], grad=True), tensor([[3.0, 0.5], [1.0, 1.0]], grad=True)
    e_j = tensor([[[1.0, 1.0], [0.0, 4.0]], [[2.0, -3.0], [5.0, 1.0]]], grad=True)
    gaps = losses.score_gaps(e_u, e_i, e_j)
    # s_ui 1 x 3 + 2 x 0.5 = 4 and -1; s_uj 1 + 2 = 3, 8 and 3, -1
    assert gaps.tolist() == [[-1.0, 4.0], [4.0, 0.0]]
    (gaps * tensor([[1.0, 2.0], [3.0, 5.0]])).sum().backward()
    # by e_u: sum of weight x (e_j - e_i); by e_i: -(1 + 2) e_u, -(3 + 5) e_u; by e_j: weight x e_u
    assert e_u.grad.tolist() == [[-8.0, 7.5], [23.0, -12.0]]
    assert e_i.grad.tolist() == [[-3.0, -6.0], [0.0, 8.0]]
    assert e_j.grad.tolist() == [[[1.0, 2.0], [2.0, 4.0]], [[0.0, -3.0], [0.0, -5.0]]]


def test_bpr_is_exact_far_from_zero_and_keeps_its_gradient():  # case E02
    gaps = tensor([[-2.0], [0.0], [200.0]], grad=True)
    each = [losses.bpr_loss(gaps[r : r + 1]).item() for r in range(3)]
    assert each == pytest.approx([0.126928, 0.693147, 200.0], abs=1e-6)
    loss = losses.bpr_loss(gaps)
    assert loss.item() == pytest.approx(66.940025, abs=1e-6)
    loss.backward()
    assert gaps.grad[2] * 3 == pytest.approx(1.0)  # the mean over three rows shares it out


def test_several_negatives_add_up_inside_the_logarithm():  # case E15
    assert losses.bpr_loss(tensor([[100.0, 100.0]])).item() == pytest.approx(100.693147, abs=1e-6)
    rows = [math.log(1 + math.exp(0.5 - 1) + math.exp(-0.5 - 1)), math.log(1 + math.exp(2 + 1) + math.exp(0 + 1))]
    got = losses.bpr_loss(tensor([[0.5 - 1, -0.5 - 1], [2.0 + 1, 0.0 + 1]]))
    assert got.item() == pytest.approx(sum(rows) / 2)


def test_hinge_counts_only_what_comes_within_the_margin():
    # margin 0.3: 0.3 - 0.1 = 0.2; 0.3 - 1 < 0; 0.3 + 0.1 = 0.4; 0.3 + 0.3 = 0.6
    got = losses.hinge_loss(tensor([[-0.1, -1.0], [0.1, 0.3]]), margin=0.3)
    assert got.item() == pytest.approx((0.2 + 0 + 0.4 + 0.6) / 4)


@pytest.mark.parametrize(
    ("pos", "neg", "temperature", "expected"),
    [(0.5, 0.1, 0.2, 0.126928), (0.3, 0.3, 0.2, 0.693147), (-1, 1, 0.005, 400.0)],
)
def test_contrast_does_not_overflow_at_small_temperatures(pos, neg, temperature, expected):  # case E03
    def at(cosine):
        return tensor([[cosine, math.sqrt(1 - cosine**2)]])

    got = losses.contrast_loss(tensor([[1.0, 0.0]]), at(pos), at(neg), temperature)
    assert got.item() == pytest.approx(expected, abs=1e-6)


def test_l2_is_half_the_sum_of_squares_over_the_batch_size():  # case E04
    table = tensor([[1, 2], [3, 4], [1, 0], [0, 1], [2, 0], [0, 2]])
    user, pos, neg = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])
    assert 1e-4 * losses.l2_loss(table, user, pos, neg).item() == pytest.approx(0.001)
    several = torch.tensor([[4, 5], [5, 0]])  # squares 4 + 4 and 4 + 5, in place of 4 and 4
    assert losses.l2_loss(table, user, pos, several).item() == pytest.approx(10.0 + 9 / 4)
    table.requires_grad_()
    (3 * losses.l2_loss(table, user, pos, several)).backward()  # a row's gradient: how often it is there, times it, / 2
    times = [2, 1, 1, 1, 1, 2]
    assert table.grad.tolist() == [[3 * n * x / 2 for x in row] for n, row in zip(times, table.tolist(), strict=True)]


def test_the_mixture_is_linear_in_alpha():  # case E06
    hard, sampled = tensor([[10.0, 0.0]]), tensor([[[0.0, 1.0]]])
    assert losses.mix(hard, sampled, 1e-4).tolist() == [[[0.001, 0.9999]]]
    assert losses.mix(hard, sampled, 0.0).tolist() == sampled.tolist()
    assert losses.mix(hard, sampled, 1.0).tolist() == [[[10.0, 0.0]]]


def test_the_anchor_moves_the_adapter_and_not_the_item():
    hard, target = tensor([[1.0, 2.0], [0.0, 0.0]], grad=True), tensor([[0.0, 0.0], [3.0, 0.0]], grad=True)
    loss = losses.anchor_loss(hard, target)
    loss.backward()
    assert loss.item() == pytest.approx((5 / 2 + 9 / 2) / 2)
    assert hard.grad.tolist() == [[0.5, 1.0], [-1.5, 0.0]]
    assert target.grad is None


def test_a_batch_without_generated_negatives_gives_zero_and_not_nan():
    nothing = torch.zeros(0, 4, requires_grad=True)
    assert losses.contrast_loss(nothing, nothing, nothing, 0.2).item() == 0
    assert losses.anchor_loss(nothing, nothing).item() == 0


def test_info_nce_equals_a_loop():
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    total = 0.0
    for r in range(5):
        cosines = [float(a[r] @ b[c] / (a[r].norm() * b[c].norm())) / 0.2 for c in range(5)]
        total -= cosines[r] - math.log(sum(math.exp(c) for c in cosines))
    assert losses.info_nce(a, b, 0.2).item() == pytest.approx(total / 5)


def test_one_negative_a_row_is_a_column_and_never_every_row_s():
    vectors = torch.zeros(3, 4)
    assert losses.score_gaps(vectors, vectors, vectors[:, None]).shape == (3, 1)
    for wrong in (lambda: losses.score_gaps(vectors, vectors, vectors), lambda: losses.mix(vectors, vectors, 0.5)):
        with pytest.raises(RuntimeError, match="expand"):
            wrong()
