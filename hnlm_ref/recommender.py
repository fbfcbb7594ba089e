"""Recommenders: the encoders (MF, LightGCN), the adapter of generated vectors, and the one training loop.

Stage 02 trains its warm-up and stage 04 its recommenders with `fit`. Letters of the shapes are in `losses.py`.
"""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from hnlm_ref import losses, metrics
from hnlm_ref.artifacts import Csr, atomic
from hnlm_ref.console import UserError, progress, say
from hnlm_ref.samplers import Batch, Sampler, trainable_pairs

# ---- encoders ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """One table of ego vectors, users first: `layers()` gives the vectors of every layer, whose mean is scored.

    This class is matrix factorisation (Rendle et al., UAI 2009). An encoder of one's own overrides `layers`, and
    `extra_loss` if it brings a loss. An enhancer (`baselines.py`) changes the ego vectors, or brings a loss.
    """

    def __init__(self, train: Csr, dim: int, n_layers: int = 0):
        super().__init__()
        self.n_users = train.n_rows
        # Choice: normal with deviation 0.1, as LightGCN's authors; also for MF.
        self.table = nn.Parameter(torch.empty(train.n_rows + train.n_cols, dim).normal_(std=0.1))  # [U + I, d]
        self.n_layers = n_layers
        self.enhancer: Any = None

    def ego(self) -> Tensor:
        return self.table if self.enhancer is None else self.enhancer.augment(self.table)

    def layers(self) -> list[Tensor]:
        """Vectors after 0, 1, ... propagations, each float32 [U + I, d]."""
        return [self.ego()]

    def extra_loss(self, batch: Batch, layers: list[Tensor]) -> Tensor:
        """A term of the encoder's own, added to the loss of a batch."""
        if self.enhancer is None:
            return torch.zeros((), device=self.table.device)
        return self.enhancer.extra_loss(batch, *self.split(layers))

    def ego_of(self, users: Tensor, *items: Tensor) -> list[Tensor]:
        """The trained, unpropagated vectors of a batch's users and items, for the L2 term (case E04)."""
        return [functional.embedding(n, self.table) for n in (users, *(i + self.n_users for i in items))]

    def split(self, layers: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The vectors that are scored, e_u [U, d] and e_i [I, d]: the mean of the layers."""
        mean = sum(layers[1:], layers[0]) / len(layers)
        return mean[: self.n_users], mean[self.n_users :]


class LightGCN(Encoder):
    """Propagation over the normalised graph, mean of the layers (He et al., SIGIR 2020)."""

    graph: Tensor

    def __init__(self, train: Csr, dim: int, n_layers: int = 2):
        super().__init__(train, dim, n_layers)
        self.register_buffer("graph", normalised_graph(train), persistent=False)

    def propagate(self, x: Tensor) -> Tensor:
        return _Propagate.apply(self.graph, x)

    def layers(self) -> list[Tensor]:
        layers = [self.ego()]
        for _ in range(self.n_layers):
            layers.append(self.propagate(layers[-1]))
        return layers


ENCODERS = {"mf": Encoder, "lightgcn": LightGCN}  # each is made by (train, dim, n_layers)


def normalised_graph(train: Csr) -> Tensor:
    """The user-item graph, sparse CSR float32 [U + I, U + I]: weight 1 / sqrt(d_u d_i) both ways (case E05)."""
    users, items = train.pairs().T
    n = train.n_rows + train.n_cols
    both = Csr.from_pairs(
        np.concatenate([users, items + train.n_rows]), np.concatenate([items + train.n_rows, users]), n, n
    )
    scale = 1 / np.sqrt(np.maximum(both.degrees(), 1))
    rows, cols = both.pairs().T
    weights = torch.from_numpy((scale[rows] * scale[cols]).astype(np.float32))
    # int32 indices take MKL's fast path, several times as fast as int64.
    indptr, indices = torch.from_numpy(both.indptr.astype(np.int32)), torch.from_numpy(both.indices)
    with warnings.catch_warnings(action="ignore"):  # torch calls its sparse CSR a beta
        return torch.sparse_csr_tensor(indptr, indices, weights, (n, n), check_invariants=True)


class _Propagate(torch.autograd.Function):
    """graph @ x. The graph is symmetric, so the gradient is graph @ gradient: no transposed copy at every step."""

    @staticmethod
    def forward(ctx, graph: Tensor, x: Tensor) -> Tensor:
        ctx.graph = graph
        with torch.autocast(x.device.type, enabled=False):  # sparse products have no bfloat16
            return graph @ x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.graph @ grads[0]


# ---- semantic alignment -----------------------------------------------------------------------------------------


class SemanticAdapter(nn.Module):
    """e_hard = adapter(h): from the language model's space into the recommender's, [P, d_llm] -> [P, d].

    kind    "mlp" (released code), or "attention": self-attention, then the MLP (the paper's figure)
    mean, deviation   float32 [d_llm] of the generated vectors. Choice: raw hidden states are nearly parallel, so
            they are standardised first.
    Choice: no ReLU behind the last layer, item vectors are signed (case X13). Attention runs between `n_heads`
    equal pieces of the one vector, so that a result does not depend on the rest of its batch.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: np.ndarray, deviation: np.ndarray, dim: int, hidden: int, kind: str, n_pieces: int = 8):
        super().__init__()
        d_llm = len(mean)
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("deviation", torch.from_numpy(deviation))
        self.n_pieces = n_pieces
        self.attention = None
        if kind == "attention":
            if d_llm % n_pieces:
                raise UserError(
                    f"adapter attention: generated vectors of {d_llm} numbers are not {n_pieces} equal pieces"
                )
            self.attention = nn.MultiheadAttention(d_llm // n_pieces, num_heads=1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d_llm, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim))

    def forward(self, h: Tensor) -> Tensor:
        x = (h - self.mean) / self.deviation
        if self.attention is not None:
            pieces = x.unflatten(1, (self.n_pieces, -1))  # [P, 8, d_llm / 8]
            x = x + self.attention(pieces, pieces, pieces, need_weights=False)[0].flatten(1)
        return self.mlp(x)


# ---- the training loop ------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """How far a training has come."""

    epoch: int = 0  # last finished epoch
    best_epoch: int = 0
    best_score: float = -1.0
    log: list[dict] = field(default_factory=list)  # one dict per epoch
    epoch_seconds: list[float] = field(default_factory=list)  # of this process, without validation


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of all that is random in an epoch (0: initial weights). No state crosses epochs, so a resumed run agrees."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> 1)


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
    amp: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
) -> Fit:
    """Train `model` with Adam and leave in it the weights of the epoch that is best on validation (case E09).

    model       holds "encoder" and whatever else is trained
    batch_loss  (batch, encoder layers) -> loss, and terms to be logged (means over the epoch's batches)
    draw        (users int32 [n], seed) -> candidates int32 [n, m, M] of a whole epoch, one call
    pairs       int32 [R, 2] (user, positive); every epoch sees each once, the last batch may be short (case B10)
    patience    stop after so many validations (NDCG@20, every `eval_every` epochs) without a better one
    checkpoint  file to go on from and to keep up to date; resumed or not, the result has the same bytes on a CPU
    Raises UserError at the first loss that is not finite, naming epoch and batch; the checkpoint stays (case E11).
    Raises AssertionError when the trainable tensors behind the first loss are not those of the optimiser (case E01).
    """
    device = next(model.parameters()).device
    encoder: Any = model["encoder"]
    done, best = Fit(), dict[str, Tensor]()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    if checkpoint is not None and checkpoint.exists():
        done, best = _load_checkpoint(checkpoint, model, optimiser)
        say(f"going on after epoch {done.epoch}")
    all_users, all_items = (torch.from_numpy(column.astype(np.int64)).to(device) for column in pairs.T)
    for epoch in progress(range(done.epoch + 1, n_epochs + 1), desc="epochs", unit="epoch"):
        if epoch - 1 - done.best_epoch >= patience * eval_every:
            break
        started = time.perf_counter()
        torch.manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(pairs))
        drawn = torch.from_numpy(draw(pairs[order.numpy(), 0], epoch_seed(seed, epoch))).to(device)
        losses_seen, sums = 0, dict[str, Tensor | float]()
        for rows, candidates in zip(order.to(device).split(batch_size), drawn.split(batch_size), strict=True):
            batch = Batch(epoch, rows, all_users[rows], all_items[rows], candidates.long())
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss, terms = batch_loss(batch, encoder.layers())
            losses_seen += 1
            if not torch.isfinite(loss):
                raise UserError(
                    f"epoch {epoch}, batch {losses_seen}: the loss is {loss.item()}; lr {lr} may be too large"
                )
            if done.epoch == 0 and losses_seen == 1:
                assert _leaves(loss) == set(model.parameters()), "the loss reaches other tensors than the optimiser"
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        line = {"epoch": epoch} | {name: float(total) / losses_seen for name, total in sums.items()}
        done.epoch_seconds.append(time.perf_counter() - started)
        if epoch % eval_every == 0 or epoch == n_epochs:
            score = metrics.evaluate(*embeddings(encoder), train, valid, (20,), n_threads)["ndcg@20"]
            line["valid_ndcg@20"] = metrics.mean(score) if valid.nnz else None
            if (
                line["valid_ndcg@20"] is None or line["valid_ndcg@20"] > done.best_score
            ):  # no validation: the last epoch
                done.best_score, done.best_epoch = line["valid_ndcg@20"] or 0.0, epoch
                best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        done.epoch, done.log = epoch, [*done.log, line]
        if checkpoint is not None and epoch % checkpoint_every == 0:
            _save_checkpoint(checkpoint, model, optimiser, done, best)
    model.load_state_dict(best)
    return done


@torch.no_grad()
def embeddings(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that are scored, float32 [U, d] and [I, d]."""
    encoder.eval()
    user_emb, item_emb = encoder.split(encoder.layers())
    encoder.train()
    return user_emb.cpu().numpy(), item_emb.cpu().numpy()


@torch.no_grad()
def negatives_of(encoder: Encoder, sampler: Sampler, pairs: np.ndarray, seed: int, batch_size: int) -> np.ndarray:
    """One epoch's (user, negative) as the trained encoder draws them, in the order of `pairs`, int32 [R n, 2]."""
    torch.manual_seed(epoch_seed(seed, 0))
    encoder.eval()
    device, layers = encoder.table.device, encoder.layers()
    drawn = torch.from_numpy(sampler.draw(np.ascontiguousarray(pairs[:, 0]), epoch_seed(seed, 0))).to(device).long()
    table, picked = torch.from_numpy(pairs.astype(np.int64)).to(device), []
    for rows in torch.arange(len(pairs), device=device).split(batch_size):
        batch = Batch(1 << 30, rows, table[rows, 0], table[rows, 1], drawn[rows])
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


def _save_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, done: Fit, best: dict) -> None:
    """One file, so that weights, optimiser and log cannot come from different epochs."""
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()} | {f"best/{n}": t for n, t in best.items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam/{number}/{name}": t for name, t in state.items()}
    with atomic(path) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, {"fit": json.dumps(asdict(done))})


def _load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[Fit, dict]:
    parts: dict[str, dict] = {"model": {}, "best": {}, "adam": {}}
    for name, tensor in load_file(path, device=str(next(model.parameters()).device)).items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    model.load_state_dict(parts["model"])
    state: dict[int, dict] = {}
    for name, tensor in parts["adam"].items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = tensor
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    with safe_open(path, "pt") as file:
        return Fit(**json.loads(file.metadata()["fit"])), parts["best"]


def warm_up(
    train: Csr,
    valid: Csr,
    *,
    seed: int,
    device: str,
    n_threads: int = 0,
    dim: int = 64,
    n_layers: int = 2,
    pool_size: int = 4,
    lambda_reg: float = 1e-4,
    **schedule: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The collaborative signal c_u, c_i: LightGCN with DNS negatives, trained on train only, early stopped on valid.

    schedule  keyword arguments of `fit`
    Returns float32 [U, d] and [I, d], deterministic on a CPU.
    """
    torch.manual_seed(epoch_seed(seed, 0))
    encoder = LightGCN(train, dim, n_layers).to(device)
    sampler = Sampler("dns", train, pool_size=pool_size, n_threads=n_threads)

    def batch_loss(batch: Batch, layers: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        user_emb, item_emb = encoder.split(layers)
        e_u, e_i = functional.embedding(batch.users, user_emb), functional.embedding(batch.items, item_emb)  # [B, d]
        j, e_j = sampler.pick(batch, layers, user_emb, item_emb)  # [B, 1], [B, 1, d]
        l2 = losses.l2_loss(*encoder.ego_of(batch.users, batch.items, j))
        return losses.bpr_loss((e_u * e_i).sum(-1), (e_u[:, None] * e_j).sum(-1)) + lambda_reg * l2, {}

    fit(
        nn.ModuleDict({"encoder": encoder}),
        batch_loss,
        sampler.draw,
        trainable_pairs(train),
        train,
        valid,
        seed=seed,
        n_threads=n_threads,
        **{"n_epochs": 60, "patience": 5} | schedule,
    )
    return embeddings(encoder)
