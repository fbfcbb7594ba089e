"""One function per equation.

Letters of the shapes, here and in every module but llm.py, which has its own: U users, I items, R training pairs, B
rows of a batch, n negatives per row, M candidates per negative, d recommender dimension, d_llm dimension of the
language model, N generated pairs, P rows of a batch that have a generated negative, m matched items per pair, K length
of a list, L layers of an encoder, d_cf and d_out dimensions of the warm-up and of the vectors that tuning compares.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional


def total(x: Tensor) -> Tensor:
    """Sum of all numbers, in pieces that torch leaves to one thread each: the same for any number of threads."""
    if x.numel() <= 1 << 14:
        return x.sum()
    return torch.stack([piece.sum() for piece in x.flatten().split(1 << 14)]).sum()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For what depends on how many threads share it: LAPACK's sums, those of bfloat16 on a CPU, see `products_vary`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def products_vary() -> bool:
    """Whether products in float32 depend on the number of threads: MKL's do not on Intel's processors alone.

    Its switch for that, set in `hnlm_ref/__init__.py`, does nothing on others.
    """
    told = Path("/proc/cpuinfo")
    return not (told.exists() and "GenuineIntel" in told.read_text(encoding="utf-8"))


def take(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows], float32 [*rows.shape, d] from [., d] and int64 rows.

    On a CPU the gradient of `index_select` has the bits of `embedding`'s and costs half as much; on a GPU only
    `embedding`'s is the same in every run.
    """
    if table.is_cuda:
        return functional.embedding(rows, table)
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])


def scores_of(user_emb: Tensor, item_emb: Tensor, candidates: Tensor) -> Tensor:
    """s_uj of a row's candidates, [B, d], [I, d], int64 [B, n, M] -> [B, n, M]; it has no gradient.

    On a CPU these places of the product alone, in a third of the time that copies of the candidates' vectors take;
    torch refuses more places in a row than there are items.
    """
    if item_emb.is_cuda or candidates[0].numel() > len(item_emb):
        return torch.einsum("bd,bnmd->bnm", user_emb, take(item_emb, candidates))
    ends = torch.arange(0, candidates.numel() + 1, candidates[0].numel())
    size = len(user_emb), len(item_emb)
    with warnings.catch_warnings(action="ignore"):  # torch calls its sparse CSR a beta
        places = torch.sparse_csr_tensor(ends, candidates.flatten(), torch.zeros(candidates.numel()), size)
    return torch.sparse.sampled_addmm(places, user_emb, item_emb.T, beta=0.0).values().view(candidates.shape)


# ---- recommender ------------------------------------------------------------------------------------------------


def mix(hard: Tensor, sampled: Tensor, alpha: float) -> Tensor:
    """e_minus = alpha e_hard + (1 - alpha) e_j; hard [P, d], sampled [P, n, d] -> [P, n, d] (case E06).

    >>> mix(hard=torch.tensor([[1.0, 0.0]]), sampled=torch.tensor([[[0.0, 1.0]]]), alpha=0.25)
    tensor([[[0.2500, 0.7500]]])
    """
    return alpha * hard[:, None].expand_as(sampled) + (1 - alpha) * sampled


def score_gaps(user_emb: Tensor, pos_emb: Tensor, neg_emb: Tensor) -> Tensor:
    """s_uj - s_ui of every negative, [B, d], [B, d], [B, n, d] -> [B, n]: what both ranking losses look at.

    As e_u (e_j - e_i), which is one product, and one in its gradient, where two scores are two.

    >>> score_gaps(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    tensor([[ 1., -1.]])
    """
    away = neg_emb - pos_emb[:, None].expand_as(neg_emb)  # [B, d] for [B, 1, d] would become [B, B, d]
    return (away * user_emb[:, None]).sum(-1)


def bpr_loss(gaps: Tensor) -> Tensor:
    """log(1 + sum over negatives of exp(s_uj - s_ui)), mean over the batch (Rendle et al. 2009; several: case E15).

    gaps [B, n]. In softplus form: never log(sigmoid), nothing added inside a log (case E02).

    >>> bpr_loss(torch.tensor([[0.0, 0.0]])).exp()  # two negatives that score as the positive does: ln 3
    tensor(3.)
    """
    gaps = gaps if gaps.shape[1] == 1 else gaps.logsumexp(1)  # of one it is slow and no change
    return total(functional.softplus(gaps)) / len(gaps)


def hinge_loss(gaps: Tensor, margin: float) -> Tensor:
    """max(0, margin - s_ui + s_uj), mean over batch and negatives: the released code's ranking loss.

    >>> hinge_loss(torch.tensor([[-1.0, 0.25]]), margin=0.25)  # 0 and 0.5
    tensor(0.2500)
    """
    return total(functional.relu(margin + gaps)) / gaps.numel()


def contrast_loss(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """softplus((cos(a, n) - cos(a, p)) / tau), mean over rows; all [P, d], no row gives 0 (E03).

    L_cl with e_u, e_i and e_hard; in tuning, with h, a triplet's positive and its own negative.

    >>> a = torch.tensor([[1.0, 0.0]])
    >>> contrast_loss(a, positive=a, negative=2 * a, temperature=0.2).exp()  # lengths do not count: ln 2
    tensor(2.)
    """
    gap = functional.cosine_similarity(anchor, negative) - functional.cosine_similarity(anchor, positive)
    return total(functional.softplus(gap / temperature)) / max(len(gap), 1)


def anchor_loss(hard_emb: Tensor, target_emb: Tensor) -> Tensor:
    """Half the squared distance of e_hard from the (fixed) vector of its best match; [P, d], no row gives 0.

    >>> anchor_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    tensor(12.5000)
    """
    return 0.5 * total((hard_emb - target_emb.detach()).square()) / max(len(hard_emb), 1)


def l2_loss(table: Tensor, *rows: Tensor) -> Tensor:
    """Half the sum of squares of the batch's ego vectors over the batch size (LightGCN's rule; case E04).

    table [U + I, d], not propagated; rows int64 [B] or [B, n], a vector that is there twice counts twice

    >>> table = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])  # a user and two items
    >>> l2_loss(table, torch.tensor([0]), torch.tensor([1]), torch.tensor([[2]]))  # (2 + 4 + 9) / 2
    tensor(7.5000)
    """
    counts = torch.cat([r.flatten() for r in rows]).bincount(minlength=len(table))  # cheaper than gathering vectors
    return _CountedSquares.apply(table, counts) / (2 * len(rows[0]))


class _CountedSquares(torch.autograd.Function):
    """Sum of counts_r |table_r|^2, with a gradient of one product where autograd's is five."""

    @staticmethod
    def forward(ctx, table: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(table, counts)
        return total(table.square().sum(1) * counts)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        table, counts = ctx.saved_tensors
        return (2 * grads[0] * counts)[:, None] * table, None


def info_nce(a: Tensor, b: Tensor, temperature: float, own: Tensor | None = None) -> Tensor:
    """-log softmax of cos(a_r, b_own) / tau among all cos(a_r, b_r'), mean over rows of a (XSimGCL, RLMRec).

    a, b  [B, d], or b [I, d] with `own` int64 [B]: the row of b that belongs to each of a; not given: the r-th

    >>> info_nce(torch.ones(1, 2), torch.ones(4, 2), 0.2, torch.tensor([3])).exp()  # four alike: ln 4
    tensor(4.)
    """
    logits = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T / temperature  # [B, B] or [B, I]
    return functional.cross_entropy(logits, torch.arange(len(a), device=a.device) if own is None else own)


# ---- tuning of the language model -------------------------------------------------------------------------------


def sft_loss(
    out: Tensor, positive: Tensor, negative: Tensor, users: Tensor, items: Tensor, temperature: float
) -> Tensor:
    """In-batch triplet loss: softplus((cos(h_b, n_b') - cos(h_b, p_b)) / tau), mean over rows b and columns b'.

    out, positive, negative  [B, d]: h, the mined hard negative, the item that was taken
    users, items             int64 [B]: a column of the same user or the same item is left out, the row's own stays
    In softplus form, finite in every dtype: cosines -1 and 1 at tau 0.05 give 40 (case D13).

    >>> h, p, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> sft_loss(h, p, n, torch.tensor([0]), torch.tensor([0]), temperature=0.05)
    tensor(40.)
    """
    out, positive, negative = (functional.normalize(x, dim=1) for x in (out, positive, negative))
    gap = (out @ negative.T - (out * positive).sum(1, keepdim=True)) / temperature  # [B, B]
    masked = (users[:, None] == users) | (items[:, None] == items)
    masked.fill_diagonal_(False)
    return functional.softplus(gap[~masked]).mean()
