"""The training loop: against a plain loop in dense torch, and what it promises about epochs, seeds and checkpoints."""

import ctypes
import gc
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, readme_code
from torch import nn

from hnlm_ref import baselines, losses, metrics, recommender
from hnlm_ref.artifacts import Csr
from hnlm_ref.console import UserError
from hnlm_ref.samplers import Batch, Generated, Sampler, trainable_pairs
from hnlm_ref.training import epoch_seed, fit, negatives_of


def make_log(n_users=30, n_items=25, n_per_user=7, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(n_items)[:n_per_user] for _ in range(n_users)])
    parts = rows[:, :-2], rows[:, -2:]
    return [Csr.from_pairs(np.repeat(np.arange(n_users), p.shape[1]), p.ravel(), n_users, n_items) for p in parts]


class Training:
    """A small training whose batches can be watched and whose loss can be changed."""

    def __init__(self, encoder=None, extra=lambda epoch, loss: loss, **knobs):
        self.train, self.valid = make_log()
        torch.manual_seed(0)
        self.encoder = encoder(self.train) if encoder else recommender.LightGCN(self.train, 6, 2)
        self.sampler, self.extra, self.batches = Sampler("dns", self.train, pool_size=3), extra, []
        self.model = nn.ModuleDict({"encoder": self.encoder})
        self.knobs = {"seed": 3, "batch_size": 32, "n_epochs": 4, "lr": 0.05} | knobs

    def batch_loss(self, batch, layers):
        self.batches.append(batch)
        user_emb, item_emb = self.encoder.split(layers)
        _, e_j = self.sampler.pick(batch, layers, user_emb, item_emb)
        e_u, e_i = user_emb[batch.users], item_emb[batch.items]
        loss = losses.bpr_loss(losses.score_gaps(e_u, e_i, e_j))
        return self.extra(batch.epoch, loss), {"rank": loss}

    def fit(self, **knobs):
        pairs, self.batches = trainable_pairs(self.train), []
        return fit(self.model, self.batch_loss, self.sampler.draw, pairs, self.train, self.valid, **self.knobs | knobs)


def test_the_loop_equals_a_plain_one_in_dense_torch():
    training = Training(lambda train: recommender.Encoder(train, 6), patience=100)
    table = training.encoder.table.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([table], lr=0.05)
    done = training.fit(n_epochs=3)
    means = {epoch: [] for epoch in (1, 2, 3)}
    for batch in training.batches:
        optimiser.zero_grad()
        user, item = table[batch.users], table[30 + batch.items]
        scores = torch.stack([(user * table[30 + batch.candidates[:, 0, m]]).sum(1) for m in range(3)], 1)
        loss = -torch.nn.functional.logsigmoid((user * item).sum(1) - scores.max(1).values).mean()
        loss.backward()
        optimiser.step()
        means[batch.epoch].append(loss.item())
        if batch.epoch == done.best_epoch:
            best = table.detach().clone()
    assert [line["rank"] for line in done.log] == pytest.approx([np.mean(m) for m in means.values()], rel=1e-5)
    assert training.encoder.table.detach().numpy() == pytest.approx(best.numpy(), abs=1e-5)


def test_every_pair_is_seen_once_an_epoch_in_a_new_order():  # cases B05, B10
    training = Training()
    training.fit(n_epochs=2, batch_size=149)  # 150 pairs: the last batch holds one
    assert [len(batch.rows) for batch in training.batches] == [149, 1, 149, 1]
    first, second = (torch.cat([b.rows for b in training.batches[k : k + 2]]) for k in (0, 2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(150))
    assert first.tolist() != second.tolist()
    negatives = [
        torch.cat([b.candidates for b in training.batches[k : k + 2]])[o.argsort()]
        for k, o in ((0, first), (2, second))
    ]
    assert not torch.equal(*negatives)


def test_data_smaller_than_a_batch_is_one_step():  # case B10
    training = Training()
    training.fit(n_epochs=1, batch_size=2048)
    assert [len(batch.rows) for batch in training.batches] == [150]


def test_training_lowers_the_loss():
    log = Training(patience=100).fit(n_epochs=30).log
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


def test_a_tensor_outside_the_optimiser_stops_the_start():  # case E01
    stray = nn.Parameter(torch.ones(()))
    training = Training(extra=lambda epoch, loss: loss * stray)
    with pytest.raises(RuntimeError, match="other tensors than the optimiser"):
        training.fit()
    assert len(training.batches) == 1
    training = Training()
    training.model["idle"] = nn.Linear(2, 2)  # in the optimiser, but no part of the loss
    with pytest.raises(RuntimeError, match="other tensors than the optimiser"):
        training.fit()


def script_validation(monkeypatch, scores):
    """Let validation give these scores in turn; the tables it was shown are kept."""
    shown, turn = [], iter(scores)

    def evaluate(user_emb, item_emb, *rest):
        shown.append(user_emb.copy())
        return {"ndcg@20": np.array([next(turn), np.nan])}

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    return shown


def test_the_best_epoch_is_kept_and_patience_ends_the_rest(monkeypatch):  # case E09
    shown = script_validation(monkeypatch, [0.1, 0.2, 0.3, 0.3, 0.2, 0.9])
    training = Training(patience=2)
    done = training.fit(n_epochs=6)
    assert (done.best_epoch, done.epoch, done.best_score) == (3, 5, 0.3)
    assert (recommender.embeddings(training.encoder)[0] == shown[2]).all()


def test_the_validation_is_the_ndcg_of_a_loop_over_users():
    training = Training()
    done = training.fit()
    user_emb, item_emb = recommender.embeddings(training.encoder)
    found = []
    for user, scores in enumerate(user_emb.astype(float) @ item_emb.T.astype(float)):
        ranking = [item for item in np.argsort(-scores).tolist() if item not in training.train.row(user)][:20]
        places = [ranking.index(item) for item in training.valid.row(user) if item in ranking]
        found.append(sum(1 / math.log2(place + 2) for place in places) / (1 + 1 / math.log2(3)))  # each holds out two
    assert done.best_score == done.log[done.best_epoch - 1]["valid_ndcg@20"] == pytest.approx(np.mean(found))


def test_the_negatives_told_of_a_training_are_drawn_with_the_whole_share_by_the_vectors_that_are_scored():
    training = enhanced("rlmrec_gen")
    encoder, pairs = training.encoder, trainable_pairs(training.train)
    with torch.no_grad():
        encoder.enhancer.mask.fill_(7)  # a masked node is there in training only
    drawn = training.sampler.draw(np.ascontiguousarray(pairs[:, 0]), epoch_seed(3, 0))[:, 0]
    user_emb, item_emb = recommender.embeddings(encoder)
    expected = [
        [u, max(pool, key=lambda j: user_emb[u] @ item_emb[j])]
        for u, pool in zip(pairs[:, 0].tolist(), drawn.tolist(), strict=True)
    ]
    assert negatives_of(encoder, training.sampler, pairs, 3, 32).tolist() == expected

    others = [  # for each pair a free item that is not the first one drawn
        next(j for j in range(25) if j not in (pool[0], *training.train.row(u)))
        for u, pool in zip(pairs[:, 0], drawn, strict=True)
    ]
    matches = torch.tensor(others)[:, None]
    made = Generated(torch.arange(len(pairs)), None, None, None, matches, torch.zeros(len(pairs), 1))
    late = Sampler("hnlm_matched", training.train, generated=made, n_ramp_epochs=99)
    assert negatives_of(encoder, late, pairs, 3, 32)[:, 1].tolist() == others

    among_top = Sampler("dns_mn", training.train, pool_size=9)
    first, second = (negatives_of(encoder, among_top, pairs, 3, 32).tolist() for _ in range(2))
    assert first == second


def test_patience_counts_validations_and_not_epochs(monkeypatch):
    script_validation(monkeypatch, [0.5, 0.4, 0.3, 0.9])
    done = Training(patience=2).fit(n_epochs=20, eval_every=3)
    assert (done.best_epoch, done.epoch) == (3, 9)
    assert [line["epoch"] for line in done.log if "valid_ndcg@20" in line] == [3, 6, 9]


def test_the_last_epoch_is_validated_whatever_its_number(monkeypatch):
    shown = script_validation(monkeypatch, [0.1, 0.2])
    training = Training()
    done = training.fit(n_epochs=4, eval_every=3)
    assert [line["epoch"] for line in done.log if "valid_ndcg@20" in line] == [3, 4] and done.best_epoch == 4
    assert (recommender.embeddings(training.encoder)[0] == shown[1]).all()


def test_the_first_loss_that_is_not_finite_stops_and_the_checkpoint_stays(tmp_path):  # case E11
    checkpoint = tmp_path / "checkpoint"
    training = Training(extra=lambda epoch, loss: loss * (torch.nan if epoch == 3 else 1))
    with pytest.raises(UserError, match=r"epoch 3, batch 1: the loss is nan; lr 0\.05"):
        training.fit(checkpoint=checkpoint, checkpoint_every=1)
    mended = Training()
    assert [line["epoch"] for line in mended.fit(checkpoint=checkpoint, n_epochs=3).log] == [1, 2, 3]
    assert {batch.epoch for batch in mended.batches} == {3}
    with pytest.raises(UserError, match=r"epoch 1: user_emb x item_emb can leave .*; lr 1e\+30 may be too large"):
        Training().fit(lr=1e30, batch_size=150)  # one step, whose loss is finite and whose vectors are not to be ranked
    training.train = Csr.from_pairs([0, 0], [0, 1], 1, 2)  # no item left as a negative
    with pytest.raises(UserError, match="nothing to train on: no user has"):
        training.fit()


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path):
    whole = Training()
    expected = whole.fit(n_epochs=6)

    def stop(epoch, loss):
        if epoch == 4:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        Training(extra=stop).fit(n_epochs=6, checkpoint=tmp_path / "c", checkpoint_every=2)
    resumed = Training()
    with torch.no_grad():
        resumed.encoder.table.zero_()  # all must come from the checkpoint
    got = resumed.fit(n_epochs=6, checkpoint=tmp_path / "c", checkpoint_every=2)
    assert got.log == expected.log
    assert torch.equal(resumed.encoder.table, whole.encoder.table)


def test_any_number_of_threads_gives_the_same_weights():  # case E07
    tables = []
    for n_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        training = Training()
        training.fit(n_threads=n_threads, batch_size=2048)
        torch.set_num_threads(before)
        tables.append(training.encoder.table)
    assert torch.equal(*tables)


def test_products_as_large_as_those_of_text_vectors_do_not_depend_on_the_threads():  # case E07
    """Sizes at which MKL shares a product out; without its strict mode the bits would differ."""
    text = np.random.default_rng(0).standard_normal((1900, 576)).astype(np.float32)
    found, before = [], torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        torch.manual_seed(0)
        kar = baselines.Kar(text, 900, 64, weight=1.0)
        optimiser = torch.optim.Adam(kar.parameters(), lr=1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            (kar.augment(torch.zeros(1900, 64)) - 1).square().mean().backward()
            optimiser.step()
        found.append(torch.cat([p.detach().flatten() for p in kar.parameters()]))
    torch.set_num_threads(before)
    assert torch.equal(*found)


FRESH_PAGES = """
import resource, torch
from hnlm_ref.training import kept_memory

def fresh_pages():  # of ten tables of 40 MB, one after the other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(fresh_pages())
with kept_memory():
    fresh_pages()  # which come to lie in the heap
    print(fresh_pages())
"""


def test_freed_memory_is_used_again_while_a_model_trains():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library is not glibc")
    told = subprocess.run([sys.executable, "-c", FRESH_PAGES], capture_output=True, text=True, check=True, cwd=ROOT)
    given_back, kept = map(int, told.stdout.split())
    assert 3 * kept < given_back


def test_what_was_there_before_a_training_is_no_garbage_to_look_through_and_is_again_afterwards():
    training, plain, frozen = Training(), gc.get_freeze_count(), []
    training.extra = lambda epoch, loss: frozen.append(gc.get_freeze_count()) or loss
    training.fit(n_epochs=1)
    assert min(frozen) > plain + 10_000
    assert gc.get_freeze_count() == 0


def test_without_validation_pairs_the_last_epoch_is_kept():
    training = Training()
    training.valid = Csr.from_pairs([], [], 30, 25)
    done = training.fit(n_epochs=3)
    assert (done.best_epoch, done.log[-1]["valid_ndcg@20"]) == (3, None)


def test_the_encoder_shown_in_the_readme_trains():
    names = {**vars(recommender), "ENCODERS": dict(recommender.ENCODERS)}
    exec(readme_code("class XSimGCL"), names)
    training = Training(lambda train: names["ENCODERS"]["xsimgcl"](train, 6, 3), patience=100)
    plain = training.batch_loss
    contrast = []

    def batch_loss(batch, layers):
        loss, terms = plain(batch, layers)
        contrast.append(training.encoder.extra_loss(batch, layers))
        return loss + 0.1 * contrast[-1], terms

    training.batch_loss = batch_loss
    log = training.fit(n_epochs=20).log
    assert log[-1]["rank"] < log[0]["rank"]
    assert contrast[-1] < contrast[0]
    first, again = recommender.embeddings(training.encoder), recommender.embeddings(training.encoder)
    assert (first[0] == again[0]).all()  # no noise when it is evaluated
    layers = training.encoder.layers()  # in training there is: at most eps in length per layer
    assert 0 < (layers[0] - training.encoder.graph @ training.encoder.table).norm(dim=1).max() <= 0.2 + 1e-6


def test_the_encoder_shown_in_the_readme_leaves_an_enhancer_its_loss():
    names = {**vars(recommender), "ENCODERS": {}}
    exec(readme_code("class XSimGCL"), names)
    users, items = torch.tensor([4, 2, 4, 9]), torch.tensor([7, 7, 1, 0])
    batch = Batch(1, torch.arange(4), users, items, torch.zeros(4, 1, 1, dtype=torch.int64))
    encoder = names["XSimGCL"](make_log()[0], 6, 2)
    layers = encoder.layers()
    contrast = encoder.extra_loss(batch, layers).item()
    for kind in ("rlmrec_con", "kar"):
        encoder.enhancer = enhanced(kind).encoder.enhancer
        alone = encoder.enhancer.extra_loss(batch, *encoder.split(layers)).item()
        assert alone > 0 or kind == "kar"
        assert encoder.extra_loss(batch, layers).item() == pytest.approx(contrast + alone, abs=1e-5)


# ---- LLM-enhanced recommenders ----------------------------------------------------------------------------------


def enhanced(kind):
    text = np.random.default_rng(0).standard_normal((55, 12)).astype(np.float32)

    def encoder(train):
        made = recommender.LightGCN(train, 6, 2)
        made.enhancer = baselines.ENHANCERS[kind](text, 30, 6, weight=0.5)
        return made

    training, plain = Training(encoder, patience=100), Training.batch_loss
    training.batch_loss = lambda batch, layers: add(plain(training, batch, layers), training.encoder, batch, layers)
    return training


def add(result, encoder, batch, layers):
    loss, terms = result
    extra = encoder.extra_loss(batch, layers)
    return loss + extra, {**terms, "extra": extra}


def likeness(vectors, texts):
    """InfoNCE at temperature 0.2 of rows that belong together, in loops."""
    cosine = [[float(a @ b / a.norm() / b.norm()) / 0.2 for b in texts] for a in vectors]
    return np.mean([math.log(sum(map(math.exp, row))) - row[n] for n, row in enumerate(cosine)])


def test_rlmrec_s_losses_are_those_of_a_loop_over_nodes():
    users, items = torch.tensor([4, 2, 4, 9]), torch.tensor([7, 7, 1, 0])
    batch = Batch(1, torch.arange(4), users, items, torch.zeros(4, 1, 1, dtype=torch.int64))
    encoder = enhanced("rlmrec_con").encoder
    layers, rlmrec = encoder.layers(), encoder.enhancer
    text = np.random.default_rng(0).standard_normal((55, 12))  # as in enhanced()
    assert rlmrec.text.numpy() == pytest.approx((text - text.mean(0)) / text.std(0), abs=1e-5)
    final, projected = torch.cat(encoder.split(layers)).detach(), rlmrec.project(rlmrec.text).detach()
    expected = sum(likeness(final[nodes], projected[nodes]) for nodes in ([2, 4, 9], [30, 31, 37]))
    assert encoder.extra_loss(batch, layers).item() == pytest.approx(expected, abs=1e-5)

    encoder = enhanced("rlmrec_gen").encoder
    layers, rlmrec = encoder.layers(), encoder.enhancer
    final = rlmrec.project(torch.cat(encoder.split(layers))).detach()
    expected = likeness(final[rlmrec.masked], rlmrec.text[rlmrec.masked])
    assert encoder.extra_loss(batch, layers).item() == pytest.approx(expected, abs=1e-5)


def test_at_most_1024_masked_nodes_enter_a_loss_and_a_number_that_all_texts_share_is_no_news():
    text = np.random.default_rng(0).standard_normal((1100, 4)).astype(np.float32)
    text[:, 1] = 5
    rlmrec = baselines.RlmRecGenerative(text, 700, 6, weight=1.0)
    assert (rlmrec.text[:, 1] == 0).all()
    few = baselines.RlmRecGenerative(text[:10], 6, 6, weight=1.0)
    assert (few.augment(torch.ones(10, 6)) == 0).all(1).sum() == 2  # one alone could be told from nothing
    rlmrec.masked, nodes = torch.arange(1100), torch.randn(1100, 6)
    found = rlmrec.extra_loss(None, *nodes.split([700, 400])).item()
    projected = rlmrec.project(nodes[:1024]).detach()
    assert found == pytest.approx(losses.info_nce(projected, rlmrec.text[:1024], 0.2).item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["rlmrec_con", "rlmrec_gen"])
def test_rlmrec_brings_vectors_and_texts_together(kind):
    log = enhanced(kind).fit(n_epochs=25).log
    assert log[-1]["extra"] < log[0]["extra"] - 0.1


def test_rlmrec_gen_masks_a_tenth_of_the_nodes_in_training_only():
    training = enhanced("rlmrec_gen")
    encoder = training.encoder
    with torch.no_grad():
        encoder.enhancer.mask.fill_(7)
    masked = (encoder.ego() == 7).all(1)
    assert masked.sum() == 5  # of 55
    assert encoder.enhancer.masked.sort().values.tolist() == masked.nonzero()[:, 0].tolist()
    encoder.eval()
    assert torch.equal(encoder.ego(), encoder.table)


def test_kar_adds_a_gated_mixture_of_shared_and_own_experts():
    training = enhanced("kar")
    kar = training.encoder.enhancer
    assert torch.equal(training.encoder.ego(), training.encoder.table)  # it starts as the plain encoder
    with torch.no_grad():
        for expert in (*kar.shared, *kar.own):
            expert[-1].reset_parameters()
    added = training.encoder.ego() - training.encoder.table
    for node, own, gate in ((3, kar.own[:2], kar.gates[0]), (30 + 4, kar.own[2:], kar.gates[1])):
        text = kar.text[node]
        outputs = [expert(text) for expert in (*kar.shared, *own)]
        expected = 0.5 * sum(w * out for w, out in zip(gate(text).softmax(0), outputs, strict=True))
        assert added[node].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    log = training.fit(n_epochs=10).log
    assert log[-1]["rank"] < log[0]["rank"]
