"""Recommenders: the encoders (MF, LightGCN) and the adapter of generated vectors. Letters of shapes: `losses.py`."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hnlm_ref import losses
from hnlm_ref.artifacts import Csr
from hnlm_ref.console import UserError
from hnlm_ref.samplers import Batch

# ---- encoders ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """One table of ego vectors, users first: `layers()` gives the vectors of every layer, whose mean is scored.

    This class is matrix factorisation (Rendle et al., UAI 2009). An encoder of one's own overrides `layers`, and
    `extra_loss` if it brings a loss, which it adds to the one here. An enhancer (`baselines.py`) changes the ego
    vectors, or brings a loss.
    """

    init_std = 0.01  # Choice: from 0.1 MF ends a tenth lower on MovieLens-100K (0.264 for 0.294, one seed)

    def __init__(self, train: Csr, dim: int, n_layers: int = 0):
        super().__init__()
        self.n_users = train.n_rows
        self.table = nn.Parameter(torch.randn(train.n_rows + train.n_cols, dim) * self.init_std)  # [U + I, d]
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

    def l2(self, batch: Batch, negatives: Tensor) -> Tensor:
        """The L2 term of a batch, on what is trained and not on what is propagated (case E04)."""
        return losses.l2_loss(self.table, batch.users, self.n_users + batch.items, self.n_users + negatives)

    def split(self, layers: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The vectors that are scored, e_u [U, d] and e_i [I, d]: the mean of the layers."""
        mean = sum(layers[1:], layers[0]) / len(layers) if layers[1:] else layers[0]
        return mean.split([self.n_users, len(mean) - self.n_users])  # backward it is one copy, two slices are four


class LightGCN(Encoder):
    """Propagation over the normalised graph, mean of the layers (He et al., SIGIR 2020)."""

    graph: Tensor
    init_std = 0.1  # as its authors

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
    """The user-item graph, sparse CSR float32 [U + I, U + I]: weight 1 / sqrt(d_u d_i) both ways (case E05).

    >>> train = Csr.from_pairs(np.array([0, 0, 0, 0]), np.arange(4), n_rows=1, n_cols=4)  # a user of four items
    >>> normalised_graph(train).to_dense()[0]
    tensor([0.0000, 0.5000, 0.5000, 0.5000, 0.5000])
    """
    users, items = train.pairs().T
    n = train.n_rows + train.n_cols
    both = Csr.from_pairs(np.r_[users, items + train.n_rows], np.r_[items + train.n_rows, users], n, n)
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
        return graph @ x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.graph @ grads[0]


@torch.no_grad()
def embeddings(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that are scored, float32 [U, d] and [I, d]."""
    encoder.eval()
    user_emb, item_emb = encoder.split(encoder.layers())
    encoder.train()
    return user_emb.cpu().numpy(), item_emb.cpu().numpy()


# ---- semantic alignment -----------------------------------------------------------------------------------------


class SemanticAdapter(nn.Module):
    """e_hard = adapter(h): from the language model's space into the recommender's, [P, d_llm] -> [P, d].

    kind    "mlp" (released code), or "attention": self-attention, then the MLP (the paper's figure)
    mean, deviation   float32 [d_llm] of the generated vectors. Choice: raw hidden states are nearly parallel, so
            they are standardised first.
    Choice: no ReLU behind the last layer, item vectors are signed (case X13). Attention runs between `n_pieces`
    equal pieces of the one vector, so that a result does not depend on the rest of its batch.
    """

    mean: Tensor
    deviation: Tensor
    n_pieces = 8

    def __init__(self, mean: np.ndarray, deviation: np.ndarray, dim: int, hidden: int, kind: str):
        super().__init__()
        d_llm = len(mean)
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("deviation", torch.from_numpy(deviation))
        self.attention = None
        if kind == "attention":
            if d_llm % self.n_pieces:
                raise UserError(f"adapter attention: vectors of {d_llm} numbers are not {self.n_pieces} equal pieces")
            self.attention = nn.MultiheadAttention(d_llm // self.n_pieces, num_heads=1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d_llm, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim))

    def forward(self, h: Tensor) -> Tensor:
        x = (h - self.mean) / self.deviation
        if self.attention is not None:
            pieces = x.unflatten(1, (self.n_pieces, -1))  # [P, 8, d_llm / 8]
            x = x + self.attention(pieces, pieces, pieces, need_weights=False)[0].flatten(1)
        return self.mlp(x)
