"""Negative samplers, the semantic guard, and the table of generated negatives.

A sampler has two halves. `draw` asks the Rust core for the candidates of a whole epoch at once; they are never
training positives of the user, and know nothing of validation and test (cases B03, B04). `pick` looks at the
current vectors and settles each row's negatives. A tie goes to the first candidate drawn.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hnlm_ref import _core, losses
from hnlm_ref.artifacts import Csr, load_npy
from hnlm_ref.console import UserError, progress, say


@dataclass(frozen=True)
class Batch:
    """One step's share of an epoch."""

    epoch: int  # from 1
    rows: Tensor  # int64 [B], positions into the training pairs
    users: Tensor  # int64 [B]
    items: Tensor  # int64 [B], positives
    candidates: Tensor  # int64 [B, n, M]


# ---- which of the candidates ------------------------------------------------------------------------------------


def pick_among_top(scores: Tensor, n_top: int) -> Tensor:
    """DNS(M, N) (Shi et al., WWW 2023): one of the highest scores, each equally likely; [..., M] -> [...].

    The paper's letters are the other way round: its M is `n_top`, its N the size of the pool. Choice: one draw stands
    for the loss over all M of them, which it has in expectation.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [..., M]
    n_kept = (scores > -torch.inf).sum(-1).clamp(max=n_top)  # -inf: not a candidate
    place = (torch.rand(scores.shape[:-1], device=scores.device) * n_kept).long()
    return order.gather(-1, place[..., None])[..., 0]


def pick_adaptive(scores: Tensor, pos_scores: Tensor, alpha: float, beta: float, p: float) -> Tensor:
    """AHNS (Lai et al., AAAI 2024): the score nearest to beta (s_ui + alpha)^(p + 1); [B, n, M], [B] -> [B, n].

    For p < -1 a positive that already scores high gets an easier negative (case B08).
    Choice: s_ui + alpha is at least 1e-6, below which the power is undefined or turns round (there the authors'
    code takes the easiest candidate).

    >>> scores = torch.tensor([[[0.0, 0.5, 1.0]]])
    >>> [pick_adaptive(scores, torch.tensor([s_ui]), alpha=0.0, beta=0.5, p=-2.0).item() for s_ui in (0.5, 1.0, 4.0)]
    [2, 1, 0]
    """
    target = beta * (pos_scores + alpha).clamp(min=1e-6) ** (p + 1)
    return (scores - target[:, None, None]).abs().argmin(-1)


def mix_hops(user_emb: Tensor, pos_layers: Tensor, candidate_layers: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """MixGCF (Huang et al., KDD 2021): every layer from its own hardest candidate, mixed with the positive.

    user_emb [B, d], pos_layers [B, L, d], candidate_layers [B, n, M, L, d], share [L] of the positive, in (0, 1)
    Choice: a batch has one share for each layer, where the authors' code has one for each positive and layer too; on
    MovieLens-100K (M = 4, three seeds) test NDCG@20 is 0.3241 with deviation 0.0010, with theirs 0.3223 and 0.0009.
    And L2 sees the item of layer 0, where theirs has the mixture of that layer.
    Returns the candidate each layer came from, int64 [B, n, L], and the vectors, mean over layers, [B, n, d].
    """
    # The positive's part of a layer is the same for every candidate, so it cannot change which one is the hardest.
    place = torch.einsum("bd,bnmld->bnlm", user_emb, candidate_layers).argmax(-1)  # [B, n, L]
    index = place[:, :, None, :, None].expand(-1, -1, 1, -1, user_emb.shape[1])
    hardest = candidate_layers.gather(2, index)[:, :, 0]  # [B, n, L, d]
    return place, (share[:, None] * pos_layers[:, None] + (1 - share[:, None]) * hardest).mean(2)


def trainable_pairs(train: Csr) -> np.ndarray:
    """The training pairs whose user has a negative left to draw (case B01), in row order, int32 [R, 2]."""
    pairs = train.pairs()
    return pairs[train.degrees()[pairs[:, 0]] < train.n_cols]


@torch.no_grad()
def percentile(user_emb: Tensor, neg_emb: Tensor, item_emb: Tensor, n_rows: int = 16) -> Tensor:
    """Share of the catalogue scored below a row's first negative, mean of the first `n_rows` rows: 1 is hardest.

    Choice: 16 of a batch, which are a few hundred an epoch; of 64 it was a third of MF's step at 60,000 items.
    """
    users, negatives = user_emb[:n_rows], neg_emb[:n_rows, 0]
    with losses.one_thread() if losses.products_vary() else contextlib.nullcontext():
        scores = users @ item_emb.T  # [16, I]
    return (scores < (users * negatives).sum(-1, keepdim=True)).float().mean()


# ---- the samplers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """One negative sampler for one training set; its knobs are explained in stage 04.

    blocked     items the semantic guard refuses, per user; None when it is off
    generated   what stage 03 made; "hnlm_matched" and "hnlm_pool" take items from it
    """

    sampler: str
    train: Csr
    base_sampler: str = "uniform"
    n_negatives: int = 1
    pool_size: int = 4
    popularity_beta: float = 0.75
    n_top: int = 2
    ahns_alpha: float = 1.0
    ahns_beta: float = 0.1
    ahns_p: float = -2.0
    n_matched: int = 1
    match_temperature: float = 0.1
    matched_share: float = 1.0
    n_ramp_epochs: int = 0
    blocked: Csr | None = None
    generated: "Generated | None" = None
    n_threads: int = 0

    @property
    def kind(self) -> str:
        """The sampler that candidates are drawn for."""
        return self.base_sampler if self.sampler in ("hnlm", "hnlm_matched") else self.sampler

    @property
    def n_candidates(self) -> int:
        """M: candidates per negative."""
        return 1 if self.kind in ("uniform", "popularity") else self.pool_size

    def draw(self, users: np.ndarray, seed: int) -> np.ndarray:
        """Candidates of a whole epoch, int32 [R, n, M], with replacement; row r's stream depends on (seed, r) only.

        Under the guard more are drawn and the first M that it lets pass are kept: a row with too few repeats them, a
        row with none keeps what was drawn first.
        """
        size = self.n_candidates
        n_drawn = size if self.blocked is None else size + GUARD_SPARE
        rows = np.repeat(users, self.n_negatives)
        graph = self.train.indptr, self.train.indices
        if self.kind == "popularity":
            counts = np.bincount(self.train.indices, minlength=self.train.n_cols)
            try:
                with np.errstate(over="ignore"):  # the core refuses an infinite weight
                    weights = np.float_power(counts, self.popularity_beta)
                drawn = _core.sample_popularity(*graph, weights, rows, n_drawn, seed, self.n_threads)
            except ValueError as error:  # a user who has all that anyone took, or weights beyond float64
                raise UserError(f"popularity: {error}; lower popularity_beta or take another sampler") from error
        else:
            drawn = _core.sample_uniform(*graph, self.train.n_cols, rows, n_drawn, seed, self.n_threads)
        if self.blocked is not None:
            passed, n_passed = _core.filter_candidates(self.blocked.indptr, self.blocked.indices, rows, drawn)
            places = np.arange(size) % np.maximum(n_passed, 1)[:, None]
            drawn = np.where(n_passed[:, None] > 0, np.take_along_axis(passed, places, 1), drawn[:, :1])
        return drawn.reshape(len(users), self.n_negatives, size)

    def pick(self, batch: Batch, layers: list[Tensor], user_emb: Tensor, item_emb: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's negatives: item numbers int64 [B, n] and vectors [B, n, d]; row r belongs to positive r (B12).

        layers      the encoder's, each [U + I, d]; user_emb [U, d] and item_emb [I, d] are their means
        """
        if self.kind == "mixgcf":
            items = torch.cat(layers, 1)[len(user_emb) :]  # [I, L d]
            pos_layers, candidate_layers = (
                losses.take(items, numbers).unflatten(-1, (len(layers), -1))
                for numbers in (batch.items, batch.candidates)
            )
            share = torch.rand(len(layers), device=items.device)
            e_u = losses.take(user_emb, batch.users).detach()
            place, vectors = mix_hops(e_u, pos_layers, candidate_layers, share)
            return batch.candidates.gather(2, place)[..., 0], vectors  # the item of layer 0 stands for the mixture
        items = self.choose(batch, user_emb, item_emb)
        return items, losses.take(item_emb, items)

    @torch.no_grad()
    def choose(self, batch: Batch, user_emb: Tensor, item_emb: Tensor) -> Tensor:
        """The items that `pick` takes, int64 [B, n]; MixGCF, which mixes several into one, has none."""
        pool = batch.candidates  # [B, n, M]
        if self.generated is not None and self.sampler != "hnlm":
            pool = self._with_matched(batch)  # [B, n, M + m], -1: not a candidate
        if pool.shape[2] == 1:
            return pool[..., 0]
        e_u = losses.take(user_emb, batch.users)  # [B, d]
        scores = losses.scores_of(e_u, item_emb, pool.clamp(min=0))
        if pool is not batch.candidates:
            scores = scores.masked_fill(pool < 0, -torch.inf)
        if self.kind == "dns_mn":
            place = pick_among_top(scores, self.n_top)
        elif self.kind == "ahns":
            pos_scores = (e_u * losses.take(item_emb, batch.items)).sum(-1)
            place = pick_adaptive(scores, pos_scores, self.ahns_alpha, self.ahns_beta, self.ahns_p)
        else:
            place = scores.argmax(-1)  # DNS (Zhang et al., SIGIR 2013): the hardest
        return pool.gather(2, place[..., None])[..., 0]

    def ramp(self, epoch: int) -> float:
        """Choice: share of the generated negatives' full weight in this epoch: rises linearly to 1."""
        return min(1.0, epoch / (self.n_ramp_epochs + 1))

    def _with_matched(self, batch: Batch) -> Tensor:
        """The pool with matched items: joining the candidates ("hnlm_pool") or in their place ("hnlm_matched").

        A row takes part with probability matched_share x ramp. Its matched items are drawn without replacement with
        probability softmax(score / temperature), by Gumbel noise, so that not the same few serve every time.
        """
        assert self.generated is not None
        shape = (*batch.candidates.shape[:2], -1)  # [B, n, .]
        matches, scores = (table[:, None].expand(shape) for table in self.generated.matches_of(batch.rows))
        noise = -torch.empty_like(scores).exponential_().log()
        keys = (scores / self.match_temperature + noise).masked_fill(matches < 0, -torch.inf)
        matched = matches.gather(2, keys.topk(min(self.n_matched, keys.shape[2])).indices)
        takes_part = torch.rand(shape[:2], device=matched.device) < self.matched_share * self.ramp(batch.epoch)
        matched = matched.masked_fill(~takes_part[..., None], -1)
        candidates = batch.candidates
        if self.sampler == "hnlm_matched":
            candidates = candidates.masked_fill((matched >= 0).any(2, keepdim=True), -1)
        return torch.cat([candidates, matched], 2)


# ---- the semantic guard -----------------------------------------------------------------------------------------

GUARD_SPARE = 8  # Choice: candidates drawn beyond M under the guard


def semantic_guard(item_text: np.ndarray, train: Csr, threshold: float) -> Csr:
    """Choice: items too similar to what a user took to be trusted as negatives; nothing like it is in the paper.

    Similarity: mean of the three largest cosines between the item's text and the user's own items', in standard
    deviations from the user's mean over the items not taken. Blocked is what exceeds `threshold`.
    item_text   float32 [I, d_llm] (sft/item_text.npy); an item without a text has a zero vector and cosine 0
    """
    text = functional.normalize(torch.from_numpy(item_text))

    def cosines() -> Iterator[Tensor]:
        """Of every training pair's item with all items, float32 [I] each."""
        n_together = max(1, (1 << 26) // len(text))  # thin products are slow, all of them at once may be many GB
        for some in np.split(train.indices, range(n_together, train.nnz, n_together)):
            own, place = np.unique(some, return_inverse=True)
            yield from map(functional.linear(text[own], text).__getitem__, place)

    found, rows = [], cosines()
    with losses.one_thread():
        for user in progress(range(train.n_rows), desc="guard", unit="user"):
            own, blocked = train.row(user), np.empty(0, np.int32)
            largest = 3 * [text.new_full((len(text),), -torch.inf)]
            for row in itertools.islice(rows, len(own)):
                for n, other in enumerate(largest):
                    largest[n], row = torch.maximum(other, row), torch.minimum(other, row)
            if 0 < len(own) < train.n_cols:
                near = torch.stack(largest[: len(own)]).mean(0).numpy()  # [I]
                others = np.delete(near, own)
                blocked = np.flatnonzero(near - others.mean() > threshold * others.std()).astype(np.int32)
            found.append(blocked)
    return Csr(np.cumsum([0, *map(len, found)]), np.concatenate(found), train.n_cols)


def n_refused(negatives: np.ndarray, blocked: Csr | None) -> int:
    """How many of the pairs (user, item), int32 [n, 2], are blocked."""
    if blocked is None:
        return 0
    users, items = np.ascontiguousarray(negatives.T)
    return len(items) - int(_core.filter_candidates(blocked.indptr, blocked.indices, users, items[:, None])[1].sum())


# ---- generated negatives ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """Stage 03's negatives laid beside the training pairs. A pair without one is -1 and never filled in (case E12)."""

    row_of: Tensor  # int64 [R], row in the arrays below, -1: none
    vectors: np.ndarray  # float16 [N, d_llm], memory-mapped
    mean: np.ndarray  # float32 [d_llm] of the vectors
    deviation: np.ndarray  # float32 [d_llm]
    matches: Tensor  # int64 [N, m], -1: none
    match_scores: Tensor  # float32 [N, m]

    def vectors_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the batch's rows have a vector, int64 [P], and those vectors, float32 [P, d_llm]."""
        found = self.row_of[rows]
        has = torch.nonzero(found >= 0)[:, 0]
        return has, torch.from_numpy(self.vectors[found[has].cpu().numpy()].astype(np.float32)).to(rows.device)

    def matches_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Matched items int64 [B, m], -1 for none, and their scores."""
        found = self.row_of[rows]
        return self.matches[found].masked_fill(found[:, None] < 0, -1), self.match_scores[found]


def load_generated(
    folder: Path, train: Csr, pairs: np.ndarray, min_coverage: float, blocked: Csr | None, device: str, by_item: bool
) -> Generated:
    """Read generate/ and join it to the training pairs, int32 [R, 2], in row order.

    A vector of zeros (a reply that named no item) counts as none. Matched items that the guard blocks, or that are
    training positives of their user, become -1 (case B15).
    by_item  the sampler takes matched items: a pair that has none left counts as none too
    Raises UserError for arrays of other kinds or lengths, for a pair that is no training pair or comes twice (case
    E13), for a vector that is not finite, naming it (case D12), or has one value throughout (case E14), and for a
    coverage of zero or below `min_coverage`.
    """
    made, vectors = load_npy(folder / "pairs.npy"), load_npy(folder / "embeddings.npy", mmap=True)
    matches, scores = load_npy(folder / "matches.npy"), load_npy(folder / "match_scores.npy")
    arrays = {"pairs": made, "embeddings": vectors, "matches": matches, "match_scores": scores}
    whole = "".join(f"{array.dtype.kind}{array.ndim}" for array in arrays.values()) == "i2f2i2f2"
    whole = whole and len(made) == len(vectors) == len(matches) and matches.shape == scores.shape
    if not whole or made.shape[1] != 2 or 0 in (vectors.shape[1], matches.shape[1]):
        told = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise UserError(f"{folder}: {told} do not fit together; run hnlm-ref generate again")
    for name, table, size in (("pairs", made, (train.n_rows, train.n_cols)), ("matches", matches, train.n_cols)):
        if (table >= size).any() or made.min(initial=0) < 0:
            raise UserError(f"{folder / name}.npy: a number lies outside {train.n_rows} users and {train.n_cols} items")
    for row in np.flatnonzero(~np.isfinite(np.where(matches < 0, 0, scores)).all(1))[:1]:
        raise UserError(f"{folder / 'match_scores.npy'}: row {row} holds a number that is not finite")
    cells, made_cells = (table.astype(np.int64) @ (train.n_cols, 1) for table in (pairs, made))
    row_of = np.full(len(pairs), -1)
    place = np.minimum(np.searchsorted(cells, made_cells), len(cells) - 1)
    row_of[place] = np.arange(len(made))
    for row in np.flatnonzero((cells[place] != made_cells) | (row_of[place] != np.arange(len(made))))[:1]:
        what = "comes twice" if cells[place[row]] == made_cells[row] else "is no training pair"
        raise UserError(f"{folder / 'pairs.npy'}: row {row}, user {made[row, 0]} and item {made[row, 1]}, {what}")
    refused = (train if blocked is None else train.union(blocked)).pairs().astype(np.int64) @ (train.n_cols, 1)
    matches = np.where(np.isin(made[:, :1].astype(np.int64) * train.n_cols + matches, refused), -1, matches)
    n, sums, squares = 0, *np.zeros((2, vectors.shape[1]))
    for start in range(0, len(vectors), 4096):  # in blocks: all of them may not fit into memory
        block = vectors[start : start + 4096].astype(np.float64)
        empty = (block == 0).all(1)
        for row in np.flatnonzero(~np.isfinite(block).all(1) | ~empty & (block.max(1) == block.min(1)))[:1]:
            what = "has one value throughout" if np.isfinite(block[row]).all() else "holds a number that is not finite"
            user, item = made[start + row]
            raise UserError(f"{folder / 'embeddings.npy'}: row {start + row}, user {user} and item {item}, {what}")
        row_of[place[start : start + 4096][empty]] = -1
        n, sums, squares = n + (~empty).sum(), sums + block.sum(0), squares + np.square(block).sum(0)
    if by_item:
        row_of[place[(matches < 0).all(1)]] = -1
    coverage = (row_of >= 0).mean()
    say(f"generated negatives for {coverage:.1%} of {len(pairs):,} training pairs; the others keep sampled negatives")
    if coverage == 0 or coverage < min_coverage:
        told = f"only {coverage:.1%} of the training pairs have a generated negative"
        raise UserError(f"{folder}: {told}, min_coverage is {min_coverage:.1%}; generate for more pairs or lower it")
    return Generated(
        torch.from_numpy(row_of).to(device),
        vectors,
        (sums / n).astype(np.float32),
        np.sqrt(np.maximum(squares / n - np.square(sums / n), 1e-12)).astype(np.float32),
        torch.from_numpy(matches.astype(np.int64)).to(device),
        torch.from_numpy(scores).to(device),
    )
