"""The one training loop: stage 02 trains its warm-up with it, stage 04 its recommenders. Letters: `losses.py`."""

import contextlib
import ctypes
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hnlm_ref import losses, metrics
from hnlm_ref.artifacts import Csr, atomic, whole
from hnlm_ref.console import UserError, progress, say
from hnlm_ref.recommender import Encoder, LightGCN, embeddings
from hnlm_ref.samplers import Batch, Sampler, trainable_pairs


@dataclass
class Fit:
    """How far a training has come."""

    epoch: int = 0  # last finished epoch
    best_epoch: int = 0
    best_score: float = -1.0
    log: list[dict] = field(default_factory=list)  # one dict per epoch
    epoch_seconds: list[float] = field(default_factory=list)  # of every epoch, without validation


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of all that is random in an epoch (0: initial weights). No state crosses epochs, so a resumed run agrees."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]) >> 1


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, existing objects are not scanned for garbage, and memory that is freed stays with the process.

    Otherwise Python scans, in one of the epochs, all that the imports made, which takes as long as ten epochs of MF on
    MovieLens. And glibc gives blocks above 32 MB back to the system when they are freed: a step makes several tables of
    all users and items, and from some 130,000 of them on, asking for fresh pages takes longer than the arithmetic.
    """
    gc.freeze()
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    glibc = hasattr(libc, "mallopt")
    trim, mmap_threshold, mmap_max = -1, -3, -4  # names of malloc.h
    if glibc:
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim, 2**31 - 1)
    try:
        yield
    finally:
        gc.unfreeze()
        if glibc:  # to where its own adjustment ends, which any setting switches off
            libc.mallopt(mmap_max, 1 << 16)
            libc.mallopt(mmap_threshold, 1 << 25)
            libc.mallopt(trim, 1 << 26)
            libc.malloc_trim(0)


@kept_memory()
def fit(
    model: nn.ModuleDict,
    batch_loss: Callable[[Batch, list[Tensor]], tuple[Tensor, dict[str, Tensor]]],
    draw: Callable[[np.ndarray, int], np.ndarray],
    pairs: np.ndarray,
    train: Csr,
    valid: Csr,
    *,
    seed: int,
    lr: float = 5e-3,
    batch_size: int = 2048,
    n_epochs: int = 100,
    patience: int = 10,
    eval_every: int = 1,
    n_threads: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 5,
) -> Fit:
    """Train `model` with Adam and leave in it the weights of the epoch that is best on validation (case E09).

    model       holds "encoder" and whatever else is trained
    batch_loss  (batch, encoder layers) -> loss, and terms to be logged (means over the epoch's batches)
    draw        (users int32 [n], seed) -> candidates int32 [n, m, M] of a whole epoch, one call
    pairs       int32 [R, 2] (user, positive); every epoch sees each once, the last batch may be short (case B10)
    patience    stop after so many validations (NDCG@20, every `eval_every` epochs) without a better one
    checkpoint  file to go on from and to keep up to date; resumed or not, the result has the same bytes on a CPU
    Raises UserError at the first loss that is not finite, naming epoch and batch; the checkpoint stays (case E11).
    Raises RuntimeError when the trainable tensors behind the first loss are not those of the optimiser (case E01).
    """
    device = next(model.parameters()).device
    encoder: Any = model["encoder"]
    done, best = Fit(), dict[str, Tensor]()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    if checkpoint is not None and checkpoint.exists():
        state, best = load_checkpoint(checkpoint, optimiser, model)
        done = Fit(**state)
        say(f"going on after epoch {done.epoch}")
    if not len(pairs):
        raise UserError("nothing to train on: no user has a training item and another item as a negative")
    users = np.ascontiguousarray(pairs[:, 0])
    all_users, all_items = (torch.from_numpy(column.astype(np.int64)).to(device) for column in pairs.T)
    for epoch in progress(range(done.epoch + 1, n_epochs + 1), desc="epochs", unit="epoch"):
        if epoch - 1 - done.best_epoch >= patience * eval_every:
            break
        started = time.perf_counter()
        torch.manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(pairs)).to(device)
        # In the order of the pairs, then shuffled like them: a user's rows lie together, which is drawn much faster.
        drawn = torch.from_numpy(draw(users, epoch_seed(seed, epoch))).to(device).index_select(0, order)
        columns = order, all_users.index_select(0, order), all_items.index_select(0, order), drawn
        losses_seen, sums = 0, dict[str, Tensor | float]()
        for rows, some_users, items, candidates in zip(*(c.split(batch_size) for c in columns), strict=True):
            batch = Batch(epoch, rows, some_users, items, candidates.long())
            loss, terms = batch_loss(batch, encoder.layers())
            losses_seen += 1
            if not math.isfinite(number := loss.item()):
                where = f"epoch {epoch}, batch {losses_seen}"
                raise UserError(f"{where}: the loss is {number}; lr {lr} may be too large")
            if done.epoch == 0 and losses_seen == 1 and _leaves(loss) != set(model.parameters()):
                raise RuntimeError("the loss reaches other tensors than the optimiser")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        line = {"epoch": epoch} | {name: float(total) / losses_seen for name, total in sums.items()}
        done.epoch_seconds.append(time.perf_counter() - started)
        if epoch % eval_every == 0 or epoch == n_epochs:
            try:
                score = metrics.evaluate(*embeddings(encoder), train, valid, (20,), n_threads)["ndcg@20"]
            except ValueError as error:  # vectors that have left float32
                raise UserError(f"epoch {epoch}: {error}; lr {lr} may be too large") from error
            line["valid_ndcg@20"] = mean = metrics.mean(score) if valid.nnz else None
            if mean is None or mean > done.best_score:  # nothing to validate on: the last epoch
                done.best_score, done.best_epoch = mean or 0.0, epoch
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        done.epoch, done.log = epoch, [*done.log, line]
        if checkpoint is not None and epoch % checkpoint_every == 0:
            save_checkpoint(checkpoint, optimiser, asdict(done), model.state_dict(), best)
    model.load_state_dict(best)
    return done


@torch.no_grad()
def negatives_of(encoder: Encoder, sampler: Sampler, pairs: np.ndarray, seed: int, batch_size: int) -> np.ndarray:
    """One epoch's (user, negative) as the trained encoder draws them, in the order of `pairs`, int32 [R n, 2]."""
    torch.manual_seed(epoch_seed(seed, 0))
    encoder.eval()
    device, layers = encoder.table.device, encoder.layers()
    drawn = torch.from_numpy(sampler.draw(np.ascontiguousarray(pairs[:, 0]), epoch_seed(seed, 0))).to(device).long()
    table, picked = torch.from_numpy(pairs.astype(np.int64)).to(device), []
    for rows in torch.arange(len(pairs), device=device).split(batch_size):
        batch = Batch(10**9, rows, table[rows, 0], table[rows, 1], drawn[rows])
        picked.append(sampler.pick(batch, layers, *encoder.split(layers))[0])
    items = torch.cat(picked).cpu().numpy()  # [R, n]
    return np.stack([np.repeat(pairs[:, 0], items.shape[1]), items.ravel()], 1).astype(np.int32)


def _leaves(loss: Tensor) -> set[Tensor]:
    """The trainable tensors that a loss depends on, found by walking its graph."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}


def save_checkpoint(path: Path, optimiser: torch.optim.Optimizer, state: dict, now: dict, best: dict) -> None:
    """One file for weights now, best weights, optimiser and counters, so that they cannot come from different steps."""
    parts = {"now": now, "best": best}
    parts |= {f"adam/{number}": moments for number, moments in optimiser.state_dict()["state"].items()}
    tensors = {f"{part}/{name}": t.cpu().contiguous() for part, found in parts.items() for name, t in found.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"state": json.dumps(state)})


def load_checkpoint(path: Path, optimiser: torch.optim.Optimizer, model: nn.Module) -> tuple[dict, dict]:
    """Put weights and optimiser back; returns the counters and the best weights."""
    parts: dict[str, dict] = {"now": {}, "best": {}}
    with whole(path), safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
        for key in file.keys():  # noqa: SIM118  (a file is no dict)
            part, _, name = key.rpartition("/")
            parts.setdefault(part, {})[name] = file.get_tensor(key)
    model.load_state_dict(parts.pop("now"), strict=False)  # frozen weights are in no checkpoint
    best = parts.pop("best")
    moments = {int(part.removeprefix("adam/")): found for part, found in parts.items()}
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    return state, best


def warm_up(
    train: Csr, valid: Csr, *, seed: int, device: str, n_threads: int = 0, dim: int = 64, **schedule: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The collaborative signal c_u, c_i: LightGCN with DNS negatives, trained on train only, early stopped on valid.

    Choice: stage 04's defaults (d = 64, 2 layers, lr 5e-3, batch 2,048, L2 1e-4) with DNS, M = 4, whatever a preset
    says of stage 04; at most 60 epochs, patience 5.
    schedule  keyword arguments of `fit`
    Returns float32 [U, d] and [I, d], deterministic on a CPU.
    """
    torch.manual_seed(epoch_seed(seed, 0))
    encoder = LightGCN(train, dim, n_layers=2).to(device)
    sampler = Sampler("dns", train, pool_size=4, n_threads=n_threads)

    def batch_loss(batch: Batch, layers: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        user_emb, item_emb = encoder.split(layers)
        e_u, e_i = losses.take(user_emb, batch.users), losses.take(item_emb, batch.items)  # [B, d]
        j, e_j = sampler.pick(batch, layers, user_emb, item_emb)  # [B, 1], [B, 1, d]
        rank = losses.bpr_loss(losses.score_gaps(e_u, e_i, e_j))
        return rank + 1e-4 * encoder.l2(batch, j), {}

    model = nn.ModuleDict({"encoder": encoder})
    schedule = {"n_epochs": 60, "patience": 5, "seed": seed, "n_threads": n_threads} | schedule
    fit(model, batch_loss, sampler.draw, trainable_pairs(train), train, valid, **schedule)
    return embeddings(encoder)
