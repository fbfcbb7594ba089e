"""Encoders and adapter: weights worked out by hand, gradients against autograd, one vector at a time."""

import json

import numpy as np
import pytest
import torch

from hnlm_ref import losses, recommender, samplers, training
from hnlm_ref.artifacts import Csr
from hnlm_ref.console import UserError
from hnlm_ref.recommender import Encoder, LightGCN, SemanticAdapter
from hnlm_ref.samplers import Batch


@pytest.fixture
def small():
    return Csr.from_pairs([0, 0, 1, 2], [0, 1, 1, 3], 3, 4)


def test_a_repeated_edge_counts_once(case_input):  # case E05
    case = json.loads(case_input("e02_adj.json").read_text(encoding="utf-8"))
    users, items = np.array(case["edges"]).T
    encoder = LightGCN(Csr.from_pairs(users, items, 2, 2), 1, n_layers=1)
    graph = encoder.graph.to_dense()
    assert graph[0, 2:].tolist() == pytest.approx([0.707107, 0.5], abs=1e-6)
    assert graph[1, 2:].tolist() == pytest.approx([0, 0.707107], abs=1e-6)
    assert torch.equal(graph, graph.T)
    with torch.no_grad():
        encoder.table.fill_(1)
    user_emb, item_emb = recommender.embeddings(encoder)
    assert user_emb[:, 0] == pytest.approx([1.103553, 0.853553], abs=1e-6)
    assert item_emb[:, 0] == pytest.approx([0.853553, 1.103553], abs=1e-6)


def test_propagation_has_the_gradient_of_a_dense_product(small):
    encoder = LightGCN(small, 5, n_layers=3)
    weights = torch.randn(7, 5)
    (sum(encoder.layers()) * weights).sum().backward()
    dense, x = encoder.graph.to_dense(), encoder.table.detach().clone().requires_grad_()
    ((x + dense @ x + dense @ dense @ x + dense @ dense @ dense @ x) * weights).sum().backward()
    assert encoder.table.grad.numpy() == pytest.approx(x.grad.numpy(), abs=1e-6)


def test_an_item_nobody_took_keeps_its_ego_vector_only(small):
    encoder = LightGCN(small, 4, n_layers=2)
    _, item_emb = recommender.embeddings(encoder)
    assert item_emb[2] == pytest.approx(encoder.table[3 + 2].detach().numpy() / 3)


def test_lightgcn_starts_from_a_tenth_and_mf_from_a_hundredth():
    train = Csr.from_pairs([0], [0], 300, 200)
    for make, deviation in ((LightGCN, 0.1), (Encoder, 0.01)):
        assert make(train, 64).table.std().item() == pytest.approx(deviation, rel=0.05)


def test_mf_scores_its_table(small):
    encoder = Encoder(small, 4)
    user_emb, item_emb = recommender.embeddings(encoder)
    assert (np.concatenate([user_emb, item_emb]) == encoder.table.detach().numpy()).all()


def test_l2_is_that_of_the_ego_vectors_of_users_items_and_negatives(small):  # case E04
    encoder = LightGCN(small, 4)
    batch = Batch(1, torch.arange(2), torch.tensor([0, 2]), torch.tensor([1, 3]), torch.zeros(2, 2, 1))
    rows = encoder.table.detach().numpy()[[0, 2, 3 + 1, 3 + 3, 3 + 2, 3 + 0, 3 + 2, 3 + 1]]
    l2 = encoder.l2(batch, torch.tensor([[2, 0], [2, 1]])).item()
    assert l2 == pytest.approx((rows**2).sum() / 2 / 2)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_an_adapted_vector_does_not_depend_on_its_batch_and_is_signed(kind):  # case X13
    torch.manual_seed(0)
    h = 5 + torch.randn(20, 32)
    adapter = SemanticAdapter(h.mean(0).numpy(), h.std(0).numpy(), dim=6, hidden=16, kind=kind)
    together, alone = adapter(h), torch.cat([adapter(row[None]) for row in h])
    assert together.shape == (20, 6)
    assert together.detach().numpy() == pytest.approx(alone.detach().numpy(), abs=1e-5)
    assert (together < 0).any() and (together > 0).any()


def test_the_adapter_sees_standardised_vectors():
    h = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    adapter = SemanticAdapter(np.float32([2, 20]), np.float32([1, 10]), dim=2, hidden=2, kind="mlp")
    adapter.mlp = torch.nn.Identity()
    assert adapter(h).tolist() == [[-1, -1], [1, 1]]


def test_attention_runs_between_the_pieces_of_a_vector():
    torch.manual_seed(0)
    adapter = SemanticAdapter(np.zeros(32, np.float32), np.ones(32, np.float32), 4, 8, "attention")
    adapter.mlp = torch.nn.Identity()
    torch.nn.init.normal_(adapter.attention.in_proj_bias)
    torch.nn.init.normal_(adapter.attention.out_proj.bias)
    h = torch.randn(2, 32)
    weight, bias = adapter.attention.in_proj_weight.detach().numpy(), adapter.attention.in_proj_bias.detach().numpy()
    out_weight, out_bias = (t.detach().numpy() for t in adapter.attention.out_proj.parameters())
    for vector, adapted in zip(h.numpy(), adapter(h).detach().numpy(), strict=True):
        pieces = vector.reshape(8, 4)
        q, k, v = (pieces @ weight[4 * n : 4 * n + 4].T + bias[4 * n : 4 * n + 4] for n in range(3))
        expected = []
        for n in range(8):
            share = np.exp(k @ q[n] / 2)  # the square root of 4 numbers a piece
            expected.append(pieces[n] + out_weight @ (share @ v / share.sum()) + out_bias)
        assert adapted == pytest.approx(np.concatenate(expected), abs=1e-5)


def test_attention_needs_vectors_of_equal_pieces():
    with pytest.raises(UserError, match="30 numbers are not 8 equal pieces"):
        SemanticAdapter(np.zeros(30, np.float32), np.ones(30, np.float32), 4, 8, "attention")


def test_the_warm_up_is_lightgcn_with_the_hardest_of_four_and_a_little_l2():
    rng = np.random.default_rng(0)
    train, valid = (Csr.from_pairs(rng.integers(0, 30, n), rng.integers(0, 20, n), 30, 20) for n in (200, 60))
    torch.manual_seed(training.epoch_seed(4, 0))
    encoder, sampler = LightGCN(train, 8, 2), samplers.Sampler("dns", train, pool_size=4)

    def batch_loss(batch, layers):
        user_emb, item_emb = encoder.split(layers)
        j, e_j = sampler.pick(batch, layers, user_emb, item_emb)
        e_u, e_i = (torch.nn.functional.embedding(*of) for of in ((batch.users, user_emb), (batch.items, item_emb)))
        rank = losses.bpr_loss(losses.score_gaps(e_u, e_i, e_j))
        return rank + 1e-4 * losses.l2_loss(encoder.table, batch.users, 30 + batch.items, 30 + j), {}

    how = {"seed": 4, "lr": 0.02, "n_epochs": 9, "batch_size": 50}
    model = torch.nn.ModuleDict({"encoder": encoder})
    training.fit(model, batch_loss, sampler.draw, samplers.trainable_pairs(train), train, valid, **how, patience=5)
    found = training.warm_up(train, valid, **how, device="cpu", dim=8)
    for table, expected in zip(found, recommender.embeddings(encoder), strict=True):
        assert (table == expected).all()


def test_warm_up_learns_two_tastes_repeats_and_goes_on(tmp_path):
    rng = np.random.default_rng(0)  # two tastes: even users take even items
    users = np.repeat(np.arange(40), 8)
    items = rng.integers(0, 20, 320) * 2 + users % 2
    train, valid = (Csr.from_pairs(users[part], items[part], 40, 40) for part in (slice(0, None, 2), slice(1, None, 2)))
    how = {"seed": 1, "device": "cpu", "dim": 8, "lr": 0.02, "patience": 30}
    one, again = (training.warm_up(train, valid, **how, n_epochs=30) for _ in range(2))
    assert (one[0] == again[0]).all() and (one[1] == again[1]).all()
    begun = {"checkpoint": tmp_path / "begun", "checkpoint_every": 5}
    _, resumed = (training.warm_up(train, valid, **how, n_epochs=n, **begun) for n in (12, 30))
    assert (one[0] == resumed[0]).all() and (one[1] == resumed[1]).all()
    scores = one[0] @ one[1].T
    same_taste = (np.arange(40)[:, None] + np.arange(40)) % 2 == 0
    own, other = scores[same_taste].reshape(40, 20), scores[~same_taste].reshape(40, 20)
    assert (own.mean(1) > other.mean(1)).all()
