"""Stage 4 timed: epochs of LightGCN and MF, the share of sampling, and RecBole on the same split where it is installed.

    pytest bench/bench_train.py -s          # one line per measurement
    HNLM_BENCH_EPOCHS=100 pytest bench/bench_train.py -s -k quality    # to the end, for the scores

RecBole 1.2.1 must be importable for its rows: beside the extra `bench` it wants colorlog, colorama 0.4.4, pyyaml,
texttable and tensorboard (and `ray` only for tuning: a stand-in does).
MovieLens-100K comes from RecBole's wheel, Amazon Toys from HNLM_DATA.
"""

import importlib.machinery
import importlib.util
import os
import resource
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hnlm_ref import losses, metrics, recommender, training
from hnlm_ref.artifacts import Run
from hnlm_ref.cli import load_stage
from hnlm_ref.samplers import Sampler, trainable_pairs

N_EPOCHS = int(os.environ.get("HNLM_BENCH_EPOCHS", "2"))
BATCH = {"ml-100k": 2048, "toys": 4096}
RECBOLE = all(map(importlib.util.find_spec, ("recbole", "colorlog", "colorama", "tensorboard", "texttable")))


@pytest.fixture(scope="session", params=["ml-100k", "toys"])
def data(request, tmp_path_factory):
    """A finished preparation: its name and Run."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "ml-100k":
        if not importlib.util.find_spec("recbole"):
            pytest.skip("MovieLens-100K: pip install --no-deps recbole==1.2.1")
        words = ["--interactions", "package:recbole/dataset_example/ml-100k", "--min-rating", "4", "--k-core", "5"]
    else:
        log = (
            Path(os.environ.get("HNLM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "amazon-toys-2014-5core"
        )
        if not log.is_dir():
            pytest.skip(f"no {log}; set HNLM_DATA")
        words = ["--interactions", str(log / "Toys_and_Games.txt")]
    load_stage("prep").main([*words, "--run-dir", str(folder)], standalone_mode=False)
    return request.param, Run(folder)


def alone(function, *args):
    """What a function gives in a new process, and its peak memory in GB: nobody's heap is as the other left it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        result = pool.submit(function, *args).result()
        return *result, pool.submit(resource.getrusage, resource.RUSAGE_SELF).result().ru_maxrss / 2**20


def train_ours(run, backbone, sampler, pool_size, batch_size, n_epochs, seed=0):
    """Seconds of each epoch (sampling included), share of them spent in drawing and choosing, and test scores."""
    prep = run.prep()
    torch.manual_seed(training.epoch_seed(seed, 0))
    encoder = recommender.ENCODERS[backbone](prep.train, 64, 2)
    sampler, sampling = Sampler(sampler, prep.train, pool_size=pool_size), []

    def timed(function, *args):
        started = time.perf_counter()
        result = function(*args)
        sampling.append(time.perf_counter() - started)
        return result

    def batch_loss(batch, layers):
        user_emb, item_emb = encoder.split(layers)
        e_u, e_i = losses.take(user_emb, batch.users), losses.take(item_emb, batch.items)
        j = timed(sampler.choose, batch, user_emb, item_emb)
        rank = losses.bpr_loss(losses.score_gaps(e_u, e_i, losses.take(item_emb, j)))
        return rank + 1e-4 * encoder.l2(batch, j), {}

    done = training.fit(
        nn.ModuleDict({"encoder": encoder}), batch_loss, lambda *a: timed(sampler.draw, *a),
        trainable_pairs(prep.train), prep.train, prep.valid, seed=seed, lr=5e-3, batch_size=batch_size,
        n_epochs=n_epochs, eval_every=1 if n_epochs > 10 else n_epochs,
    )  # fmt: skip
    known = prep.train.union(prep.valid)
    scores = metrics.evaluate(*recommender.embeddings(encoder), known, run.test(), (20,))
    return done.epoch_seconds, sum(sampling) / sum(done.epoch_seconds), {k: metrics.mean(v) for k, v in scores.items()}


def train_recbole(run, backbone, batch_size, n_epochs, folder, seed=0):
    """The same from RecBole: the same split by its benchmark files, the same settings, uniform negatives."""
    for name in ("ray", "ray.tune"):
        sys.modules.setdefault(name, types.ModuleType(name)).__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["ray"].tune = sys.modules["ray.tune"]
    for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "long": int}.items():
        vars(np).setdefault(name, kind)  # names that NumPy 2 dropped
    import scipy.sparse
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    scipy.sparse.dok_matrix._update = lambda matrix, cells: matrix._dict.update(cells)  # nor does scipy have this one
    prep = run.prep()
    (folder / "log").mkdir(exist_ok=True)
    for part, csr in (("train", prep.train), ("valid", prep.valid), ("test", run.test())):
        rows = "".join(f"{u}\t{i}\n" for u, i in csr.pairs())
        (folder / "log" / f"log.{part}.inter").write_text("user_id:token\titem_id:token\n" + rows, encoding="utf-8")
    config = Config({"lightgcn": "LightGCN", "mf": "BPR"}[backbone], "log", config_dict={
        "data_path": str(folder), "benchmark_filename": ["train", "valid", "test"],
        "load_col": {"inter": ["user_id", "item_id"]},
        "embedding_size": 64, "n_layers": 2, "reg_weight": 1e-4, "require_pow": True, "learning_rate": 5e-3,
        "train_batch_size": batch_size, "eval_batch_size": 1 << 22, "epochs": n_epochs, "stopping_step": 10,
        "eval_step": 1 if n_epochs > 10 else n_epochs, "metrics": ["Recall", "NDCG"], "topk": [20],
        "valid_metric": "NDCG@20", "eval_args": {"split": {"LS": "valid_and_test"}, "order": "RO", "mode": "full"},
        "seed": seed, "show_progress": False, "checkpoint_dir": str(folder), "use_gpu": False, "state": "ERROR",
    })  # fmt: skip
    init_seed(seed, True)
    parts = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, parts[0].dataset)
    trainer, seconds = get_trainer(config["MODEL_TYPE"], config["model"])(config, model), []
    train_epoch = trainer._train_epoch

    def timed(*args, **kwargs):
        started = time.perf_counter()
        loss = train_epoch(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return loss

    trainer._train_epoch = timed
    load = torch.load
    torch.load = lambda *a, **k: load(*a, **{**k, "weights_only": False})
    trainer.fit(parts[0], parts[1], saved=True, show_progress=False)
    return seconds, {k: float(v) for k, v in trainer.evaluate(parts[2], show_progress=False).items()}


def tell(label, seconds, memory, *more):
    print(f"\n{label}: {np.median(seconds):.4f} s an epoch (median of {len(seconds)}), peak {memory:.2f} GB", *more)


@pytest.mark.parametrize("backbone", ["lightgcn", "mf"])
@pytest.mark.parametrize(("sampler", "pool_size"), [("uniform", 1), ("dns", 8)])
def test_epoch_and_sampling_share(data, backbone, sampler, pool_size):
    name, run = data
    seconds, share, _, memory = alone(train_ours, run, backbone, sampler, pool_size, BATCH[name], N_EPOCHS)
    tell(f"{name} {backbone} {sampler} M={pool_size}", seconds, memory, f"sampling {share:.1%}")
    assert len(seconds) == N_EPOCHS or N_EPOCHS > 10  # which may stop early


@pytest.mark.skipif(not RECBOLE, reason="RecBole with its dependencies is not installed")
@pytest.mark.parametrize("backbone", ["lightgcn", "mf"])
@pytest.mark.parametrize("seed", [0, 1, 2], ids="seed{}".format)
def test_quality_and_speed_beside_recbole(data, backbone, seed, tmp_path):
    name, run = data
    ours, _, scores, memory = alone(train_ours, run, backbone, "uniform", 1, BATCH[name], N_EPOCHS, seed)
    scores = {column: round(score, 4) for column, score in scores.items() if column[:2] in ("re", "nd")}
    tell(f"{name} {backbone} hnlm-ref seed {seed}", ours, memory, scores)
    theirs, scores, memory = alone(train_recbole, run, backbone, BATCH[name], N_EPOCHS, tmp_path, seed)
    ratio = f"ratio {np.median(theirs) / np.median(ours):.1f}"
    tell(f"{name} {backbone} RecBole seed {seed}", theirs, memory, scores, ratio)
    assert len(ours) > 0
